"""Which of the two ways through an output layer is taken: the one place that decides.

======================  ==========================  ==================================================
way                     matrix products             what has to exist at a time
======================  ==========================  ==================================================
two passes              4: the logits twice         a tile of logits, and fp32 sums [n, h]
gradient in forward     3                           a block of logits: some tokens, all of a rank's columns
======================  ==========================  ==================================================

The gradient is made in forward where all of these hold, else two passes are made:

* the loss is a policy gradient alone: entropy bonus and KL to a reference policy carry gradients of their own (the caller
  says so by asking);
* a block that fits into ``chunk_bytes`` holds all tokens, or at least ``_FEWEST_ROWS``. Every block adds to all of the
  weight's gradient, which is read and written for that: 8 bytes for each 2 r operations, with r tokens in a block. A device
  that does 230 operations in the time of a byte (H100: 770 TFLOP/s, 3.35 TB/s) takes as long for the bytes as for the
  product where r is 920; if nothing overlaps, three products with fewer tokens cost more than the fourth. Two cores of a CPU
  do some 20 operations in that time, so 128 are enough;
* the weight's gradient has a place: ``main_grad`` in fp32 with a promised ``backward_scale``, or a gradient of its own that
  loses nothing by being added to (one block, or a dtype that is not 16 bits). Two passes need no promise, and finish 16-bit
  gradients chunk by chunk.
"""

from __future__ import annotations

import math

import torch

from megatron_dppo.ops.fp32_product import is_16_bit
from megatron_dppo.ops.linear_call import CHUNK_BYTES

# The block of a GPU is larger: 1104 tokens with 151,936 columns of fp32 logits, 2208 of bf16 ones.
BLOCK_BYTES = {"cpu": CHUNK_BYTES}
BLOCK_BYTES_ELSEWHERE = 640 * 2**20
_FEWEST_ROWS = {"cpu": 128}
_FEWEST_ROWS_ELSEWHERE = 1024


def rows_of_a_block(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    num_tokens: int,
    *,
    fp32_logits: bool,
    accumulate_into_main_grad: bool,
    backward_scale: float | None,
    chunk_bytes: int | None,
) -> int | None:
    """Tokens of a block for ``zero_with_policy_gradient``; None: take ``fused_linear_policy_stats``.

    Args:
        hidden: [..., h] and
        weight: [V/TP, h], as they will be passed; no values are read.
        num_tokens: tokens that are computed. The same on all ranks that share the vocabulary, and then so is the answer.
        fp32_logits: see ``fused_linear_policy_stats``, and so for
        accumulate_into_main_grad: where the weight's gradient goes.
        backward_scale: what backward is promised to be called with.
        chunk_bytes: largest tile of logits; None: what suits the device.
    """
    if num_tokens == 0 or not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return None
    kind, width = hidden.device.type, weight.shape[0]
    most_bytes = BLOCK_BYTES.get(kind, BLOCK_BYTES_ELSEWHERE) if chunk_bytes is None else chunk_bytes
    logit_bytes = 4 if fp32_logits and is_16_bit(hidden) else hidden.dtype.itemsize
    most_rows = most_bytes // (width * logit_bytes)
    if most_rows < min(num_tokens, _FEWEST_ROWS.get(kind, _FEWEST_ROWS_ELSEWHERE)):
        return None
    blocks = math.ceil(num_tokens / most_rows)
    if weight.requires_grad and not _has_place(weight, blocks, accumulate_into_main_grad, backward_scale):
        return None
    return math.ceil(num_tokens / blocks)  # of about equal length


def _has_place(weight: torch.Tensor, blocks: int, into_main_grad: bool, backward_scale: float | None) -> bool:
    """Whether the weight's gradient can be added up block by block, without losing digits or holding a second one."""
    if not into_main_grad:
        return blocks == 1 or not is_16_bit(weight)
    main_grad = getattr(weight, "main_grad", None)
    return backward_scale is not None and main_grad is not None and (blocks == 1 or not is_16_bit(main_grad))
