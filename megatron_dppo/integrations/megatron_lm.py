"""The loss as Megatron's schedules want it: ``loss_func(output_tensor) -> (loss_sum, num_tokens, {name: [num, den]})``.

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        logits = model(batch["tokens"], batch["position_ids"], None)            # no labels: [b, s, V/TP]
        return logits, make_loss_func(config, batch, vocab_size=vocab_size, tp_group=tp_group)

Set ``calculate_per_token_loss=True`` in the TransformerConfig: ``finalize_model_grads`` then divides by the token count
of the whole data- and context-parallel group, which is what makes loss and gradient independent of how the batch was
split.

Megatron adds up pairs, so the report has the means only. Percentiles and maxima are in the metrics of the whole output::

    parts: list[MetricSums] = []
    ... make_loss_func(..., collect=lambda output: parts.append(output.metrics))
    metrics = MetricSums.total(parts).all_reduce(data_parallel_group).finalize()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.dppo_loss import DPPOLoss, LossOutput
from megatron_dppo.loss.inputs import LossInputs

LossFunc = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def make_loss_func(
    config: DPPOConfig,
    batch: LossInputs | Mapping[str, Any] | Any,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    inplace_backward: bool = False,
    backward_scale: float | None = None,
    checks: Literal["now", "deferred", "off"] = "now",
    collect: Callable[[LossOutput], None] | None = None,
) -> LossFunc:
    """Bind a micro-batch to the loss.

    Args:
        config: what is optimised.
        batch: LossInputs, or a mapping or object that has its fields by name, [b, s] each and aligned with the logits; other
            fields are not looked at.
        vocab_size: true vocabulary size. Megatron pads the vocabulary, and padding must not count as probability.
        tp_group: Megatron's tensor-parallel group (``parallel_state.get_tensor_model_parallel_group()``); None: the logits
            are whole. Sharded logits without it are an error, as they are narrower than the vocabulary.
        backend, inplace_backward, checks: as for ``DPPOLoss``.
        backward_scale: as for ``DPPOLoss``: 1.0 with ``calculate_per_token_loss`` where nothing scales the loss
            (``grad_scale_func`` is None, or the optimizer is not fp16's).
        collect: called with the whole LossOutput of this micro-batch.

    Raises:
        LossInputError: a required field is missing.
    """
    inputs = batch if isinstance(batch, LossInputs) else LossInputs.from_fields(batch)
    loss = DPPOLoss(
        config,
        vocab_size=vocab_size,
        tp_group=tp_group,
        backend=backend,
        inplace_backward=inplace_backward,
        backward_scale=backward_scale,
        checks=checks,
    )

    def loss_func(output_tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        output = loss(output_tensor, inputs)
        if collect is not None:
            collect(output)
        return output.loss, output.num_tokens.int(), output.metrics.pairs()  # Megatron adds the counts up in int32

    return loss_func
