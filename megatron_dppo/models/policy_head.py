"""The output layer, for response tokens only.

In RL most tokens of a batch are prompt or padding: no loss needs their logits, and logits are what a long batch runs out
of memory for. So the model is run without its output layer (``hidden_states_only``), and ``PolicyHead`` applies the layer's
weight to the hidden states of the tokens that count, or hands both to a loss that never holds the logits at all
(``ops/fused_linear.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.layers import linear_with_frozen_weight
from megatron.core.transformer.module import Float16Module

from megatron_dppo.models.sharding import unwrapped
from megatron_dppo.ops.fp32_linear import fp32_linear
from megatron_dppo.ops.fp32_product import is_16_bit
from megatron_dppo.ops.layout_linear import layout_linear
from megatron_dppo.ops.tile_tree import Deterministic, deterministic_choice


@contextmanager
def hidden_states_only(model: torch.nn.Module) -> Iterator[None]:
    """Within: a forward of ``model`` returns what would enter its output layer.

    That is [b, s, h] after the final norm, or [b, s/TP, h] with sequence parallelism, in the model's dtype. A chunk that is
    not on the last pipeline stage returns what it always does. Only forwards count: a backward, with or without
    activation recompute, may come later.

    Args:
        model: a chunk of the policy, with whatever wraps it (DistributedDataParallel, Float16Module).
    """
    with ExitStack() as undo:
        gpt_model = _gpt_model(model)
        if gpt_model.post_process:
            # The forward of the instance, not the module: hooks still run, such as the wait for a gathered parameter.
            gpt_model.output_layer.forward = _pass_through
            undo.callback(delattr, gpt_model.output_layer, "forward")
            for wrapper in model.modules():
                if isinstance(wrapper, Float16Module):  # would turn the last stage's output into fp32
                    wrapper.forward = partial(wrapper.forward, fp32_output=False)
                    undo.callback(delattr, wrapper, "forward")
        yield


class PolicyHead:
    """The output layer of a last-stage chunk, to be applied to the tokens that count.

    Attributes:
        weight: [V/TP, h] this rank's rows of the output layer: its own, or the embedding's if they are tied.
        tp_group: the tensor-parallel group that shares the vocabulary.
        sequence_parallel: whether the model's hidden states are split over that group along the sequence.
        fp32_logits: whether the logits of a 16-bit model are fp32 (``build_policy(fp32_head=True)``). Those of an fp32 model
            are in any case.

    Raises ValueError for a chunk that has no output layer, or one that does more than multiply by a weight.
    """

    weight: torch.nn.Parameter
    tp_group: dist.ProcessGroup
    sequence_parallel: bool
    fp32_logits: bool

    def __init__(self, model: torch.nn.Module) -> None:
        gpt_model = _gpt_model(model)
        if not gpt_model.post_process:
            raise ValueError(
                "this chunk has no output layer: PolicyHead needs the last chunk of the last pipeline stage"
            )
        layer = gpt_model.output_layer
        if layer.bias is not None or getattr(gpt_model.config, "use_mup", False):
            raise ValueError("PolicyHead knows output layers without bias and without muP's scaling of the logits only")
        tied = gpt_model.share_embeddings_and_output_weights
        self.weight = gpt_model.shared_embedding_or_output_weight() if tied else layer.weight
        self.tp_group = layer.tp_group
        self.sequence_parallel = layer.sequence_parallel
        self.fp32_logits = gpt_model.fp32_head
        self._gradient_accumulation_fusion = layer.gradient_accumulation_fusion

    def response_hidden(self, output: torch.Tensor, rows: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Select the hidden states of the tokens that count; who made the batch chose them. Rows are left out here alone.

        The backward sums the incoming gradient over the tensor-parallel ranks: each rank gives the part that comes from its
        own rows of ``weight`` (``fused_linear_policy_stats(..., reduce_hidden_grad=False)`` does).

        Args:
            output: [B, S, h] what the model returned within ``hidden_states_only``; [B, S/TP, h] with sequence parallelism.
            rows: [n] int64 positions in the flattened [B, S], the same on all ranks of ``tp_group``.
            shape: (B, S) of the tokens.

        Returns:
            [n, h], in the order of ``rows``. n may be 0.

        Raises:
            ValueError: ``output`` is not the hidden states of these tokens.
        """
        size = dist.get_world_size(self.tp_group) if self.sequence_parallel else 1
        batch, length = shape
        expected = (batch, length // size, self.weight.shape[1])
        if tuple(output.shape) != expected:
            raise ValueError(
                f"the model's output has shape {tuple(output.shape)}, tokens of {tuple(shape)} ask for hidden states "
                f"{expected}: run the model within hidden_states_only, on these tokens"
            )
        if not self.sequence_parallel:
            hidden_nh = output.flatten(0, 1).index_select(0, rows)
            return copy_to_tensor_model_parallel_region(hidden_nh, group=self.tp_group)
        hidden_SBh = gather_from_sequence_parallel_region(output.transpose(0, 1).contiguous(), group=self.tp_group)
        return hidden_SBh.flatten(0, 1).index_select(0, rows % length * batch + rows // length)

    def logits(self, hidden_nh: torch.Tensor, deterministic: Deterministic = "off") -> torch.Tensor:
        """[n, h] -> [n, V/TP]: this rank's shard of the logits of ``response_hidden``'s tokens.

        In the model's dtype, or fp32 with ``fp32_logits``. The weight's gradient takes Megatron's way: it is added to
        ``main_grad`` at once if the model was built with fused accumulation, else by Megatron's hooks.

        With ``deterministic="layout"`` logits and gradients are the bits of the fused way, whose gradient is added to
        ``main_grad``, where there is one, in any case (``ops/layout_linear.py``).
        """
        if deterministic_choice(deterministic) == "layout":
            return layout_linear(
                hidden_nh,
                self.weight,
                tp_group=self.tp_group,
                reduce_hidden_grad=False,  # response_hidden sums it
                accumulate_into_main_grad=hasattr(self.weight, "main_grad"),
                fp32_logits=self.fp32_logits,
            )
        if self.fp32_logits and is_16_bit(self.weight):
            return fp32_linear(hidden_nh, self.weight, accumulate_into_main_grad=self._gradient_accumulation_fusion)
        linear: Any = linear_with_grad_accumulation_and_async_allreduce
        if not self.weight.requires_grad:
            linear = linear_with_frozen_weight
        return linear(
            hidden_nh,
            self.weight,
            bias=None,
            gradient_accumulation_fusion=self._gradient_accumulation_fusion,
            allreduce_dgrad=False,  # response_hidden sums it
            sequence_parallel=False,
            tp_group=self.tp_group,
        )


def _gpt_model(model: torch.nn.Module) -> GPTModel:
    return unwrapped([model])[0]


def _pass_through(hidden_SBh: torch.Tensor, *unused: Any, **unused_too: Any) -> tuple[torch.Tensor, None]:
    """In place of the output layer's forward."""
    return hidden_SBh, None
