"""Where packed sequences begin: what core, Transformer Engine and our own attention each read, and from where.

Bounds are known on the host when a micro-batch is made. To ask a GPU for them costs a wait for all that it has queued, in
every layer, so each reader gets them where it reads:

* core's rotary embedding without a fused kernel, and our attention, cut tensors by them: on the **host**;
* fused rotary embedding and Transformer Engine's attention are kernels: on the **device**;
* one variable-length attention call (``SdpaCoreAttention`` on a GPU) is a kernel too: ``cu_seqlens``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedSequences(PackedSeqParams):
    """Core's description of packed sequences, with their bounds on the host too.

    Attributes:
        bounds: where the sequences begin, and the end of the last, before any cut over context-parallel ranks.
        cu_seqlens: [sequences + 1] int32, the same as a tensor, on the device of the tokens. What core reads
            (``cu_seqlens_q`` and its siblings) may lie on the host.
    """

    bounds: tuple[int, ...] = ()
    cu_seqlens: torch.Tensor | None = None

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor], core_reads_on_device: bool) -> PackedSequences:
        """The same with its tensors moved: ``cu_seqlens``, and what core reads if it reads that on the device."""
        assert self.cu_seqlens is not None
        cu_seqlens, shared = move(self.cu_seqlens), self.cu_seqlens
        read_by_core: dict[str, Any] = {
            field.name: cu_seqlens if core_reads_on_device else shared
            for field in fields(PackedSeqParams)
            if getattr(self, field.name) is shared  # all of them are this one tensor
        }
        return replace(self, cu_seqlens=cu_seqlens, **read_by_core)


def packed_sequences(bounds: Sequence[int], context_parallel_size: int) -> PackedSequences:
    """Of a row of packed sequences, every token of which belongs to one.

    Padding is counted as part of the sequence before it: it stands behind the tokens, where causal attention keeps it from
    reaching them, so nothing has to know about it. Attention kernels that skip it are slower or do not exist, and
    Transformer Engine takes *padded bounds that are another tensor* than the bounds (2.18 and later), or *any tensor whose
    values it then compares on the device* (before), for padding between sequences; FlashAttention is out then. So padded
    bounds are given with context parallelism only, where it needs them, and are the same object; and where core has a field
    for it (0.19), there is said to be none.

    Args:
        bounds: where the sequences begin, and the end of the last.
        context_parallel_size: ranks that will share each.
    """
    cu_seqlens = torch.tensor(tuple(bounds), dtype=torch.int32)
    longest = max(end - start for start, end in pairwise(bounds))
    known = {field.name for field in fields(PackedSeqParams)}
    optional: dict[str, Any] = {"pad_between_seqs": False} if "pad_between_seqs" in known else {}
    if context_parallel_size > 1:
        optional.update(cu_seqlens_q_padded=cu_seqlens, cu_seqlens_kv_padded=cu_seqlens)
    return PackedSequences(
        bounds=tuple(bounds),
        cu_seqlens=cu_seqlens,
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **optional,
    )


def local_bounds(packed: PackedSeqParams, local_tokens: int, context_parallel_size: int) -> list[int]:
    """Where the sequences begin and end among this rank's tokens. ValueError if they cannot be laid out like this."""
    if isinstance(packed, PackedSequences):
        bounds = list(packed.bounds)
    else:
        bounds = (packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded).tolist()
    if bounds[-1] != local_tokens * context_parallel_size:
        raise ValueError(
            f"packed_seq_params end at token {bounds[-1]}, but there are {local_tokens * context_parallel_size} tokens: "
            "let padding be part of the last sequence, or a sequence of its own"
        )
    for start, end in pairwise(bounds):
        if context_parallel_size > 1 and (end - start) % (2 * context_parallel_size):
            raise ValueError(
                f"a packed sequence of {end - start} tokens cannot be cut for context_parallel_size="
                f"{context_parallel_size}: pad each sequence to a multiple of {2 * context_parallel_size} tokens"
            )
    longest = max(end - start for start, end in pairwise(bounds))
    if packed.max_seqlen_q == bounds[-1] > longest:
        raise ValueError(
            f"packed_seq_params.max_seqlen_q={packed.max_seqlen_q} is the number of tokens: Megatron-core would count "
            f"positions on from one sequence to the next; set it to the longest sequence, {longest}"
        )
    return [bound // context_parallel_size for bound in bounds]
