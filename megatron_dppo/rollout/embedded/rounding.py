"""Weights as a server with fewer bits would hold them: what makes the engine's policy another one than the trainer's.

A rounded tensor is back in its own dtype: the products are computed as before, so the difference between the two policies is
that of the weights alone, and the log-probs that are recorded are exactly those of the policy that drew the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

_FP8_MAX, _INT8_MAX = 448.0, 127.0


def round_to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    """To the nearest bfloat16."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def round_rows_to_fp8(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n] matrices to fp8 (e4m3); one scale per row maps its largest entry to 448. Vectors stay as they are."""
    return _round_rows(tensor, _FP8_MAX, lambda scaled: scaled.to(torch.float8_e4m3fn).float())


def round_rows_to_int8(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n] matrices to 255 integers; one scale per row maps its largest entry to 127. Vectors stay as they are."""
    return _round_rows(tensor, _INT8_MAX, torch.round)


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bf16": round_to_bf16,
    "fp8_e4m3": round_rows_to_fp8,
    "int8": round_rows_to_int8,
}


def _round_rows(tensor: torch.Tensor, largest: float, to_grid: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if tensor.dim() < 2:
        return tensor.clone()
    scale = tensor.float().abs().amax(dim=-1, keepdim=True) / largest
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros
    return (to_grid(tensor.float() / scale) * scale).to(tensor.dtype)


class RoundedWeights:
    """Puts rounded weights in the place of a policy's own for as long as it generates.

    A row is a row of the shard that this rank holds, as servers with tensor parallelism quantise too.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], weight_rounding: str, router_rounding: str) -> None:
        """``chunks``: unwrapped model chunks of this rank. The roundings are keys of ``ROUNDINGS``; any other: none."""
        self._rounded = [
            (parameter, ROUNDINGS[rounding])
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            if (rounding := router_rounding if ".router." in name else weight_rounding) in ROUNDINGS
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model computes with its present weights, rounded. Afterwards it has the very same storage as before."""
        present = [parameter.data for parameter, _ in self._rounded]
        try:
            for parameter, rounding in self._rounded:
                parameter.data = rounding(parameter.data)
            yield
        finally:
            for (parameter, _), data in zip(self._rounded, present, strict=True):
                parameter.data = data
