"""What the loss is told about every token: the one list of fields, and the same fields flat for computing.

A token that is masked out may hold anything: NaN, ids of -100. It is passed over by the kernels, and replaced by something
harmless where plain torch computes, instead of being picked out: the number of tokens that count is known on the device only,
and to ask for it would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.config import DPPOConfig


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The engine's K likeliest tokens at every position.

    Attributes:
        ids: [..., K] int64 global ids, distinct.
        log_probs: [..., K] fp32, at the sampling temperature.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Which sequence every token is of; read by the per-sequence aggregations only.

    Attributes:
        ids: [...] int64, the sequence of each token. None: every row of a [b, s] batch is one.
        lengths: [...] int64, masked-in tokens of the token's whole sequence; needed where sequences are spread over ranks
            (context parallelism).
        starts: [...] bool, True at a sequence's first masked-in token; needed there too, so that one rank counts it.
    """

    ids: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    starts: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Everything per token that the loss takes, [...] being the tokens' shape: [b, s] or [n].

    All ranks of the tensor-parallel group pass the same.

    Attributes:
        target: [...] int64 global ids of the sampled tokens, aligned with the logits that predict them.
        loss_mask: [...] bool or 0/1: response tokens. Nothing outside is read. None: every token counts.
        advantages: [...] fp32.
        rollout_log_probs: [...] fp32 log-probs that the serving engine reported for ``target`` at
            ``DPPOConfig.temperature``; up to rounding above 0 is taken as 0.
        rollout_topk: the engine's top K; for topk_*, better predictive directions, and the hybrid exact divergence.
        rollout_logits: [..., V/TP] under the rollout weights, recomputed; for exact_*.
        ref_log_probs: [...] fp32 of a reference policy; needed if ``kl_coef`` is not 0.
        sequences: for the per-sequence aggregations of packed or split sequences.
    """

    target: torch.Tensor
    loss_mask: torch.Tensor | None
    advantages: torch.Tensor
    rollout_log_probs: torch.Tensor
    rollout_topk: TopK | None = None
    rollout_logits: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    sequences: Sequences | None = None

    @classmethod
    def from_fields(cls, batch: Mapping[str, Any] | Any) -> LossInputs:
        """The fields of a mapping or an object by their names here; others are not looked at.

        Raises:
            LossInputError: one that is always needed is missing.
        """
        get = batch.get if isinstance(batch, Mapping) else lambda name: getattr(batch, name, None)
        found: dict[str, Any] = {field.name: get(field.name) for field in fields(cls)}
        missing = [name for name in ("target", "loss_mask", "advantages", "rollout_log_probs") if found[name] is None]
        if missing:
            raise LossInputError(f"the batch lacks {', '.join(missing)}")
        return cls(**found)

    def take(self, rows: torch.Tensor) -> LossInputs:
        """The tokens at ``rows`` [n] of the flattened [...] only: compact fields, [n] (and [n, K], [n, V/TP])."""
        dims = self.target.dim()
        return map_tensors(self, lambda values: values.flatten(0, dims - 1).index_select(0, rows))

    def to(self, device: torch.device) -> LossInputs:
        """The same on another device."""
        return map_tensors(self, lambda values: values.to(device, non_blocking=True))


Fields = TypeVar("Fields", LossInputs, TopK, Sequences)


def map_tensors(holder: Fields, change: Callable[[torch.Tensor], torch.Tensor]) -> Fields:
    """The same fields with every tensor changed, those of the fields that hold tensors too."""

    def changed(value: Any) -> Any:
        if value is None:
            return None
        return change(value) if isinstance(value, torch.Tensor) else map_tensors(value, change)

    return replace(holder, **{field.name: changed(getattr(holder, field.name)) for field in fields(holder)})


@dataclass(frozen=True)
class FlatTokens:
    """The N tokens of a call in the dtype of its arithmetic, contiguous; outside the mask anything may stand.

    Attributes:
        mask: [N] bool, or None: every token counts.
        target: [N] int64.
        advantages: [N].
        rollout_log_probs: [N]; rounding may have put one above 0.
        topk_ids: [N, K] int64, or None if nothing reads the top K.
        topk_log_probs: [N, K], as ``rollout_log_probs``; or None.
        ref_log_probs: [N], or None.
    """

    mask: torch.Tensor | None
    target: torch.Tensor
    advantages: torch.Tensor
    rollout_log_probs: torch.Tensor
    topk_ids: torch.Tensor | None
    topk_log_probs: torch.Tensor | None
    ref_log_probs: torch.Tensor | None

    def masked(self, values: torch.Tensor) -> torch.Tensor:
        """[N, ...] with 0 where the mask is False."""
        return masked(values, self.mask)

    def cleaned(self) -> FlatTokens:
        """The same, finite and harmless outside the mask, and without log-probs above 0."""
        outside = None if self.mask is None else ~self.mask
        topk_ids, topk_log_probs = self.topk_ids, self.topk_log_probs
        if topk_ids is not None and topk_log_probs is not None:
            topk_ids = filled(topk_ids, outside, 0)
            topk_log_probs = filled(topk_log_probs, outside, -torch.inf).clamp(max=0.0)
        return replace(
            self,
            target=filled(self.target, outside, 0),
            advantages=filled(self.advantages, outside, 0.0),
            rollout_log_probs=filled(self.rollout_log_probs, outside, 0.0).clamp(max=0.0),
            topk_ids=topk_ids,
            topk_log_probs=topk_log_probs,
            ref_log_probs=None if self.ref_log_probs is None else filled(self.ref_log_probs, outside, 0.0),
        )

    def part(self, block: slice) -> FlatTokens:
        """Some of the tokens."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: values[block] for name, values in parts.items() if values is not None})

    def count(self) -> torch.Tensor:
        """Scalar int64: how many tokens count. It stays on the device."""
        if self.mask is None:
            return torch.full((), self.target.shape[0], dtype=torch.int64, device=self.target.device)
        return self.mask.sum()


def masked(values: torch.Tensor, mask: torch.Tensor | None, outside: float = 0.0) -> torch.Tensor:
    """[N, ...] with ``outside`` where the mask [N] is False; None is all True."""
    return values if mask is None else filled(values, ~mask, outside)


def filled(values: torch.Tensor, where: torch.Tensor | None, value: float) -> torch.Tensor:
    """[N, ...] with ``value`` where ``where`` [N] is True; None is nowhere."""
    if where is None:
        return values
    return values.masked_fill(where.view(-1, *(1,) * (values.dim() - 1)) if values.dim() > 1 else where, value)


def check_fields(config: DPPOConfig, inputs: LossInputs, shape: torch.Size) -> None:
    """Raise LossInputError where a field is missing or its shape or dtype is wrong; values are not looked at.

    Args:
        config: what is needed.
        inputs: the fields.
        shape: [...] of the tokens that the policy's output stands for.
    """
    if config.partition == "topk" and inputs.rollout_topk is None:
        raise LossInputError(
            f"divergence={config.divergence!r} needs rollout_topk: have the engine return top-K log-probs"
        )
    if config.needs_rollout_logits and inputs.rollout_logits is None:
        raise LossInputError(
            f"divergence={config.divergence!r} needs rollout_logits: a forward pass with the weights that drew the tokens"
        )
    if config.kl_coef != 0.0 and inputs.ref_log_probs is None:
        raise LossInputError("kl_coef is not 0, which needs ref_log_probs")
    topk, sequences = inputs.rollout_topk, inputs.sequences or Sequences()
    if topk is not None and topk.ids.shape != topk.log_probs.shape:
        raise LossInputError(
            f"rollout_topk: ids {tuple(topk.ids.shape)} and log_probs {tuple(topk.log_probs.shape)} differ"
        )
    for name, values in (
        ("loss_mask", inputs.loss_mask),
        ("target", inputs.target),
        ("advantages", inputs.advantages),
        ("rollout_log_probs", inputs.rollout_log_probs),
        ("ref_log_probs", inputs.ref_log_probs),
        ("rollout_topk.ids", None if topk is None else topk.ids),
        ("rollout_topk.log_probs", None if topk is None else topk.log_probs),
        ("sequences.ids", sequences.ids),
        ("sequences.lengths", sequences.lengths),
        ("sequences.starts", sequences.starts),
    ):
        if values is None:
            continue
        found = values.shape[:-1] if name.startswith("rollout_topk") else values.shape
        if found != shape:
            raise LossInputError(
                f"{name} has shape {tuple(values.shape)}; the policy's output asks for {tuple(shape)}"
                + (" first" if name.startswith("rollout_topk") else "")
            )
        if name in ("target", "rollout_topk.ids") and values.dtype != torch.int64:
            raise LossInputError(f"{name} must be torch.int64, not {values.dtype}")
        fp32 = name == "advantages" or name.endswith("log_probs")
        if fp32 and values.dtype not in (torch.float32, torch.float64):
            raise LossInputError(
                f"{name} must be float32, not {values.dtype}: half precision has lost the ratio already"
            )


def flatten(config: DPPOConfig, inputs: LossInputs, dtype: torch.dtype) -> FlatTokens:
    """The fields that ``config`` reads, flat, as ``dtype``. Values are neither checked nor changed."""
    n = inputs.target.numel()

    def per_token(values: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
        return values.reshape(n, *values.shape[inputs.target.dim() :]).to(dtype).contiguous()

    topk = inputs.rollout_topk if config.reads_topk else None
    return FlatTokens(
        mask=None if inputs.loss_mask is None else per_token(inputs.loss_mask, torch.bool),
        target=per_token(inputs.target, torch.int64),
        advantages=per_token(inputs.advantages),
        rollout_log_probs=per_token(inputs.rollout_log_probs),
        topk_ids=None if topk is None else per_token(topk.ids, torch.int64),
        topk_log_probs=None if topk is None else per_token(topk.log_probs),
        ref_log_probs=None if inputs.ref_log_probs is None else per_token(inputs.ref_log_probs),
    )
