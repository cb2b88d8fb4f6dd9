"""The loss as Megatron's schedules want it: ``loss_func(output_tensor) -> (loss_sum, num_tokens, {name: [num, den]})``.

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        logits = model(batch["tokens"], batch["position_ids"], None)            # no labels: [b, s, V/TP]
        return logits, make_loss_func(config, batch, vocab_size=vocab_size)

Set ``calculate_per_token_loss=True`` in the TransformerConfig: ``finalize_model_grads`` then divides by the token count
of the whole data- and context-parallel group, which is what makes loss and gradient independent of how the batch was
split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.dppo_loss import DPPOLoss, LossOutput

REQUIRED_FIELDS = ("target", "loss_mask", "advantages", "rollout_log_probs")
OPTIONAL_FIELDS = (
    "rollout_topk_ids",
    "rollout_topk_log_probs",
    "rollout_logits",
    "ref_log_probs",
    "sequence_ids",
    "sequence_lengths",
    "sequence_starts",
)
LossFunc = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def make_loss_func(
    config: DPPOConfig,
    batch: Mapping[str, Any] | Any,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    inplace_backward: bool = True,
    collect: Callable[[LossOutput], None] | None = None,
) -> LossFunc:
    """Bind a micro-batch to the loss.

    Args:
        config: what is optimised.
        batch: mapping or object with the tensors of ``DPPOLoss``, [b, s] each and aligned with the logits: target,
            loss_mask, advantages and rollout_log_probs, and optionally those in ``OPTIONAL_FIELDS``. Other fields are
            not looked at.
        tp_group: tensor-parallel group; None: Megatron's, if its parallel state is initialised.
        vocab_size: true vocabulary size. Megatron pads the vocabulary: without it, padding counts as probability.
        backend: auto | cuda | cpu | torch.
        inplace_backward: write the gradient over the logits, which saves their size in memory. Nothing else may need
            them.
        collect: called with the whole LossOutput of this micro-batch: extrema and histogram are not sums, so they do
            not fit through Megatron's report.

    Raises:
        ValueError: a required field is missing.
    """
    fields = {name: _field(batch, name) for name in (*REQUIRED_FIELDS, *OPTIONAL_FIELDS)}
    missing = [name for name in REQUIRED_FIELDS if fields[name] is None]
    if missing:
        raise ValueError(f"the batch lacks {', '.join(missing)}")
    loss = DPPOLoss(config, tp_group=_tensor_parallel_group() if tp_group is None else tp_group, vocab_size=vocab_size)

    def loss_func(output_tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        out = loss(output_tensor, **fields, inplace_backward=inplace_backward, backend=backend)
        if collect is not None:
            collect(out)
        # Megatron adds the counts up in int32.
        return out.loss, out.num_tokens.int(), {name: torch.stack(pair) for name, pair in out.metrics.items()}

    return loss_func


def _field(batch: Mapping[str, Any] | Any, name: str) -> Any:
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


def _tensor_parallel_group() -> dist.ProcessGroup | None:
    from megatron.core import parallel_state  # slow to import, and only integrations need it

    return parallel_state.get_tensor_model_parallel_group() if parallel_state.model_parallel_is_initialized() else None
