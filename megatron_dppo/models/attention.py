"""Attention for Megatron on PyTorch's own fused kernels: any device, any layout, no Transformer Engine.

``SdpaCoreAttention`` takes the place of Megatron's ``core_attention`` in a layer spec. Core's own unfused attention
keeps the whole [b, heads, s, s] score matrix and refuses context parallelism and packed sequences; this one does not.

Layouts, in core's names: ``[s, b, heads, dim]`` (sbhd), or ``[tokens, heads, dim]`` (thd) for packed sequences. With
context parallelism a rank holds chunks ``r`` and ``2 CP - 1 - r`` of each sequence, so that causal work is spread
evenly; keys and values are gathered over the context-parallel ranks, queries stay.

What packed sequences look like is core's contract as much as ours (its rotary embedding reads the same numbers):

* The boundaries are ``cu_seqlens_q_padded``, or ``cu_seqlens_q`` without it. They count the tokens of all
  context-parallel ranks, and **every token belongs to a sequence**: padding is the end of one, or one of its own. It
  influences no other token, because attention is causal and sequences do not see each other.
* With context parallelism each sequence has a multiple of 2 CP tokens.
* ``max_seqlen_q`` is the longest of them. It must not be the total unless there is one sequence: core then takes
  positions to count on from one sequence to the next.
"""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dppo.models.packed_sequences import PackedSequences, local_bounds

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None
_VARLEN_TAKES = frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masked_out: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention of ``sq`` queries over ``sk >= sq`` keys; several query heads may share one key head.

    Args:
        query: [b, heads, sq, dim]; query i stands at position ``sk - sq + i`` of the keys.
        key: [b, groups, sk, dim]; heads is a multiple of groups.
        value: [b, groups, sk, dim].
        masked_out: [b or 1, 1, sq, sk] bool, True where a query must NOT look (Megatron's convention), causality
            included. None: causal.
        scale: multiplies the scores.

    Returns:
        [b, heads, sq, dim], dtype of ``query``.
    """
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    allowed = None if masked_out is None else masked_out.logical_not()
    if queries == 1:
        # One query sees every key, so the heads that share a key head can pose as its queries: no repeated keys, and a
        # kernel without grouped-query support will do.
        grouped = query.reshape(batch, groups, heads // groups, -1)
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=allowed, scale=scale).reshape(query.shape)
    if allowed is None and queries < keys:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=heads != groups
    )


def takes_variable_lengths(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's variable-length attention computes such packed sequences: FlashAttention does, on GPUs, in 16 bits.

    It came with torch 2.10 and learned of grouped queries and causality by name later; older ones attend to one sequence
    after the other.
    """
    return (
        _VARLEN_TAKES.issuperset(("scale", "window_size", "enable_gqa"))
        and device_type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim <= 256
        and head_dim % 8 == 0
    )


def attention_scale(config: TransformerConfig) -> float:
    """What the scores are multiplied by. Raises ValueError for attention variants that ``attend`` does not compute."""
    unsupported = {
        "attention_dropout": config.attention_dropout != 0.0,
        "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        "window_size": config.window_size is not None,
        "softmax_type": config.softmax_type != "vanilla",
        "multi_latent_attention": config.multi_latent_attention,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ValueError(f"{name}={getattr(config, name)} is not supported by SdpaCoreAttention: leave it unset")
    if config.softmax_scale is not None:
        return float(config.softmax_scale)
    return 1.0 / math.sqrt(config.kv_channels)


class SdpaCoreAttention(MegatronModule):
    """Causal self-attention for a Megatron layer spec (``core_attention=SdpaCoreAttention``); it has no parameters.

    The arguments are those that core passes. Raises ValueError for what it does not compute, see ``attention_scale``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if attention_type != "self":
            raise ValueError(f"SdpaCoreAttention computes self-attention, not attention_type={attention_type!r}")
        if attention_dropout:
            raise ValueError(f"attention_dropout={attention_dropout} is not supported by SdpaCoreAttention")
        scale = attention_scale(config)
        self.softmax_scale = scale if softmax_scale is None else softmax_scale
        self.cp_group = (
            parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp
        )  # one rank without context parallelism

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend, keys and values being at least as long as the queries.

        Args:
            query: [sq, b, heads/TP, dim], or [tokens, heads/TP, dim] if packed.
            key, value: [sk, b, groups/TP, dim], or [tokens, groups/TP, dim] if packed.
            attention_mask: [b or 1, 1, sq, sk] bool, True = masked out; None: causal, as it must be for packed sequences
                and with context parallelism.
            attn_mask_type: not used: without a mask, attention is causal, which for one query over a cache is no mask.
            attention_bias: must be None.
            packed_seq_params: where the packed sequences begin; None if there is one sequence per batch row.
            unused: what newer versions of core pass to special attention modules.

        Returns:
            [sq, b, heads/TP * dim], or [tokens, heads/TP * dim] if packed.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by SdpaCoreAttention")
        if packed_seq_params is None and self.cp_group.size() == 1:
            return self._attend(query, key, value, attention_mask)
        if attention_mask is not None:
            raise ValueError("packed, or with context parallelism, attention is causal: pass attention_mask=None")
        if packed_seq_params is not None:
            return self._attend_packed(query, key, value, packed_seq_params)
        return self._attend_own_chunks(query, self._gather(key), self._gather(value))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masked_out: torch.Tensor | None
    ) -> torch.Tensor:
        """[sq, b, heads, dim] -> [sq, b, heads * dim]."""
        # The kernels want [b, heads, s, dim]; these are views, and the kernels take any strides.
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = attend(query, key, value, masked_out, self.softmax_scale)
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """One call for all sequences where there is a kernel for that, else one for each: the cost is the sum of the squared
        lengths, not the square of the sum.
        """
        size = self.cp_group.size()
        bounds = local_bounds(packed, query.shape[0], size)
        if size == 1 and takes_variable_lengths(query.device.type, query.dtype, query.shape[-1]):
            return self._attend_at_once(query, key, value, packed, bounds)
        if size > 1:
            key, value = self._gather(key), self._gather(value)
        contexts = []
        for start, end in pairwise(bounds):
            if end == start:
                continue
            own = query[start:end, None]
            if size > 1:
                context = self._attend_own_chunks(own, key[:, start:end, None], value[:, start:end, None])
            else:
                context = self._attend(own, key[start:end, None], value[start:end, None], None)
            contexts.append(context[:, 0])
        return torch.cat(contexts)

    def _attend_at_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams, bounds: list[int]
    ) -> torch.Tensor:
        """[tokens, heads, dim] -> [tokens, heads * dim]: one kernel, whatever the number of sequences."""
        given: Any = packed.cu_seqlens if isinstance(packed, PackedSequences) else packed.cu_seqlens_q
        cu_seqlens = given.to(device=query.device, dtype=torch.int32)  # a copy only if somebody else made ``packed``
        longest = max(end - start for start, end in pairwise(bounds))
        context: torch.Tensor = varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=self.softmax_scale,
            window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return context.flatten(start_dim=1)

    def _attend_own_chunks(
        self, query: torch.Tensor, keys_of_ranks: torch.Tensor, values_of_ranks: torch.Tensor
    ) -> torch.Tensor:
        """This rank's two chunks of one sequence's queries, each over all keys up to its end.

        [sq, b, heads, dim] and [CP, sq, b, groups, dim] -> [sq, b, heads * dim].
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = _in_sequence_order(keys_of_ranks), _in_sequence_order(values_of_ranks)
        contexts = []
        for chunk, index in zip(query.chunk(2), (rank, 2 * size - 1 - rank), strict=True):
            end = (index + 1) * chunk.shape[0]
            contexts.append(self._attend(chunk, key[:end], value[:end], None))
        return torch.cat(contexts)

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        """[s, ...] per rank -> [CP, s, ...]; backward sums the gradients over the ranks and scatters them."""
        gathered = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=self.cp_group)
        return gathered.unflatten(0, (self.cp_group.size(), -1))


def _in_sequence_order(of_ranks: torch.Tensor) -> torch.Tensor:
    """[CP, 2 chunks, ...] -> [2 CP chunks, ...]."""
    # Rank r holds chunks r and 2 CP - 1 - r, so the first halves come in order and the second halves in reverse.
    first, second = of_ranks.chunk(2, dim=1)
    return torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)])
