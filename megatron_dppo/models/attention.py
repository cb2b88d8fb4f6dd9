"""Attention for Megatron on PyTorch's own fused kernels: any device, any layout, no Transformer Engine.

``SdpaCoreAttention`` takes the place of Megatron's ``core_attention`` in a layer spec. Core's own unfused attention
keeps the whole [b, heads, s, s] score matrix and refuses context parallelism and packed sequences; this one does not.

Layouts, in core's names: ``[s, b, heads, dim]`` (sbhd), or ``[tokens, heads, dim]`` (thd) for packed sequences. With
context parallelism a rank holds chunks ``r`` and ``2 CP - 1 - r`` of each sequence, so that causal work is spread
evenly; keys and values are gathered over the context-parallel ranks, queries stay.
"""

from __future__ import annotations

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
            attention_mask: [b or 1, 1, sq, sk] bool, True = masked out; None: causal.
            attn_mask_type: not used: without a mask, attention is causal, which for one query over a cache is no mask.
            attention_bias: must be None.
            packed_seq_params: where the packed sequences begin; None if there is one sequence per batch row.
            unused: what newer versions of core pass to special attention modules.

        Returns:
            [sq, b, heads/TP * dim], or [tokens, heads/TP * dim] if packed.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by SdpaCoreAttention")
        if packed_seq_params is not None:
            return self._attend_packed(query, key, value, packed_seq_params)
        if self.cp_group.size() > 1:
            if attention_mask is not None:
                raise ValueError("with context parallelism attention is causal: pass attention_mask=None")
            return self._attend_context_parallel(query, key, value)
        return self._attend(query, key, value, attention_mask)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masked_out: torch.Tensor | None
    ) -> torch.Tensor:
        """[sq, b, heads, dim] -> [sq, b, heads * dim]."""
        # The kernels want [b, heads, s, dim]; these are views, and the kernels take any strides.
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = attend(query, key, value, masked_out, self.softmax_scale)
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)

    def _attend_context_parallel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """This rank's two chunks of queries over all keys up to the end of each chunk."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (_gather_chunks(x, self.cp_group) for x in (key, value))
        contexts = []
        for chunk, index in zip(query.chunk(2), (rank, 2 * size - 1 - rank), strict=True):
            end = (index + 1) * chunk.shape[0]
            contexts.append(self._attend(chunk, key[:end], value[:end], None))
        return torch.cat(contexts)

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """One causal call per sequence: its cost is the sum of the squared lengths, not the square of the sum."""
        if self.cp_group.size() > 1:
            raise ValueError("SdpaCoreAttention does not support packed sequences with context parallelism")
        padded = packed.cu_seqlens_q_padded
        bounds = (packed.cu_seqlens_q if padded is None else padded).tolist()
        if bounds[-1] > query.shape[0]:
            raise ValueError(f"packed_seq_params end at token {bounds[-1]}, but there are {query.shape[0]} tokens")
        contexts = [
            self._attend(query[start:end, None], key[start:end, None], value[start:end, None], None)[:, 0]
            for start, end in pairwise(bounds)
            if end > start
        ]
        tail = query[bounds[-1] :].flatten(start_dim=1)  # tokens beyond the last sequence belong to nobody
        return torch.cat([*contexts, torch.zeros_like(tail)])


def _gather_chunks(local: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """[2 chunks, ...] per rank -> [2 CP chunks, ...] in sequence order; backward sums and scatters the gradients."""
    size = group.size()
    chunks = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=group).chunk(2 * size)
    # Rank r holds chunks r and 2 CP - 1 - r, so the first halves come in order and the second halves in reverse.
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])
