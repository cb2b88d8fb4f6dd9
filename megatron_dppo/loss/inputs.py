"""From the caller's padded tensors to the n tokens that count, checked.

Everything after this works on [n] vectors of real tokens, so no masked position can reach a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dppo.errors import LossInputError

# Rounding in a serving engine's softmax; more than this is another distribution.
TOPK_MASS_TOLERANCE = 1e-3
# Rounding can put a log-prob slightly above 0; more than this is not rounding.
_LOG_PROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TokenBatch:
    """The n tokens inside the loss mask.

    Attributes:
        mask: [...] bool, the loss mask.
        rows: [n] int64, where the tokens sit in the flattened mask.
        target: [n] int64 sampled token ids.
        advantages: [n].
        rollout_log_probs: [n] <= 0.
        topk_ids: [n, K] int64; K = 0 if the engine's top K was not given.
        topk_log_probs: [n, K] <= 0.
        ref_log_probs: [n] or None.
    """

    mask: torch.Tensor
    rows: torch.Tensor
    target: torch.Tensor
    advantages: torch.Tensor
    rollout_log_probs: torch.Tensor
    topk_ids: torch.Tensor
    topk_log_probs: torch.Tensor
    ref_log_probs: torch.Tensor | None

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """[..., *] -> [n, *]."""
        return values.reshape(self.mask.numel(), *values.shape[self.mask.dim() :]).index_select(0, self.rows)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[n] -> [...] with 0 outside the mask."""
        return values.new_zeros(self.mask.numel()).index_copy_(0, self.rows, values).view(self.mask.shape)


def select_tokens(
    shape: torch.Size,
    dtype: torch.dtype,
    target: torch.Tensor,
    loss_mask: torch.Tensor,
    advantages: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    rollout_topk_ids: torch.Tensor | None = None,
    rollout_topk_log_probs: torch.Tensor | None = None,
    ref_log_probs: torch.Tensor | None = None,
) -> TokenBatch:
    """Check shapes, dtypes and values (of masked-in tokens only) and pick the tokens.

    Args:
        shape: [...], what the policy's output asks for.
        dtype: of the floating-point results.
        target, loss_mask, ...: as in ``DPPOLoss``.

    Raises:
        LossInputError: names the input, and the position for a bad value.
    """
    if (rollout_topk_ids is None) != (rollout_topk_log_probs is None):
        raise LossInputError("rollout_topk_ids and rollout_topk_log_probs must be given together")
    if loss_mask.shape != shape:
        raise LossInputError(
            f"loss_mask has shape {tuple(loss_mask.shape)}; the policy's output asks for {tuple(shape)}"
        )
    mask = loss_mask.bool()
    rows = mask.reshape(-1).nonzero()[:, 0]

    def select(name: str, values: torch.Tensor, trailing: int = 0) -> torch.Tensor:
        if values.shape[: values.dim() - trailing] != shape:
            raise LossInputError(
                f"{name} has shape {tuple(values.shape)}; the policy's output asks for {tuple(shape)} first"
            )
        return values.reshape(mask.numel(), *values.shape[len(shape) :]).index_select(0, rows)

    def select_fp32(name: str, values: torch.Tensor, trailing: int = 0) -> torch.Tensor:
        if values.dtype not in (torch.float32, torch.float64):
            raise LossInputError(
                f"{name} must be float32, not {values.dtype}: half precision has lost the ratio already"
            )
        return select(name, values, trailing).to(dtype)

    log_mu = select_fp32("rollout_log_probs", rollout_log_probs)
    ids = rows.new_zeros(rows.shape[0], 0)
    topk_log_mu = log_mu.new_zeros(rows.shape[0], 0)
    if rollout_topk_ids is not None and rollout_topk_log_probs is not None:
        ids = select("rollout_topk_ids", rollout_topk_ids, trailing=1)
        topk_log_mu = select_fp32("rollout_topk_log_probs", rollout_topk_log_probs, trailing=1)
        if ids.shape != topk_log_mu.shape:
            raise LossInputError("rollout_topk_ids and rollout_topk_log_probs differ in K")
    selected_target, advantages = select("target", target), select_fp32("advantages", advantages)
    ref = None if ref_log_probs is None else select_fp32("ref_log_probs", ref_log_probs)
    tokens = TokenBatch(
        mask, rows, selected_target, advantages, log_mu.clamp(max=0.0), ids, topk_log_mu.clamp(max=0.0), ref
    )
    _check_values(tokens, loss_mask=select("loss_mask", loss_mask), log_mu=log_mu, topk_log_mu=topk_log_mu)
    return tokens


def _check_values(tokens: TokenBatch, loss_mask: torch.Tensor, log_mu: torch.Tensor, topk_log_mu: torch.Tensor) -> None:
    """Raise for the first bad token. ``log_mu`` and ``topk_log_mu`` are the engine's, before clamping."""
    mass = topk_log_mu.double().exp().sum(dim=1)
    checks = [
        ("loss_mask must be 0 or 1", loss_mask, loss_mask == 1),
        ("advantages must be finite", tokens.advantages, tokens.advantages.isfinite()),
        (
            "rollout_log_probs must be finite and, but for rounding, not above 0",
            log_mu,
            log_mu.isfinite() & (log_mu <= _LOG_PROB_TOLERANCE),
        ),
        (
            "rollout_topk_log_probs must not be NaN nor, but for rounding, above 0",
            topk_log_mu,
            (topk_log_mu <= _LOG_PROB_TOLERANCE).all(dim=1),
        ),
        ("the rollout top-K probabilities must not sum to more than 1", mass, mass <= 1.0 + TOPK_MASS_TOLERANCE),
    ]
    if tokens.ref_log_probs is not None:
        checks.append(("ref_log_probs must be finite", tokens.ref_log_probs, tokens.ref_log_probs.isfinite()))
    # One transfer from the device for all checks together.
    passed = torch.stack([fine.all() for _, _, fine in checks]).tolist()
    for (text, values, fine), is_fine in zip(checks, passed, strict=True):
        if not is_fine:
            first = int((~fine).nonzero()[0, 0])
            raise LossInputError(f"{text}: {values[first].tolist()} at {_position(tokens, first)}")


def _position(tokens: TokenBatch, index: int) -> str:
    place = [int(i) for i in torch.unravel_index(tokens.rows[index].cpu(), tokens.mask.shape)]
    where = f"batch index {place[0]}, position {place[1]}" if len(place) == 2 else f"token {', '.join(map(str, place))}"
    return f"{where} (token id {int(tokens.target[index])})"
