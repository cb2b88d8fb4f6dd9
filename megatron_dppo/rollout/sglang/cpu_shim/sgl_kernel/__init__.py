"""Stands in for SGLang's CUDA kernel package on a CPU host.

There SGLang computes everything in plain PyTorch and merely imports names from ``sgl_kernel``. Each name resolves to a
function that raises if it is called after all; the few that a CPU server really reaches are written out below.
"""

import types
from typing import Any

import torch

__version__ = "0.4.10+cpu.standin"

# Router replay registers its host buffer with the CUDA runtime without asking whether there is one.
torch.cuda.cudart = lambda: types.SimpleNamespace(
    cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0, cudaGetErrorString=str
)


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    *_: Any,
) -> None:
    """Write each request's run of cache slots into its row: the runs lie one after the other in ``out_cache_loc``."""
    taken, runs = 0, (req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist())
    for row, start, end in zip(*runs, strict=True):
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


_MASK = 0xFFFFFFFF


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) & _MASK) | (x >> (32 - bits))


def _mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """One step of MurmurHash3 (32 bit) on unsigned values held in int64, whose products wrap without harm."""
    block = _rotate_left((block * 0xCC9E2D51) & _MASK, 15)
    state = _rotate_left(state ^ ((block * 0x1B873593) & _MASK), 13)
    return (state * 5 + 0xE6546B64) & _MASK


def _murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """[rows] seeds, [rows] positions, [columns] ids -> [rows, columns] hashes in [0, 2**32), for seeded sampling."""
    seed, positions = seed.to(torch.int64), positions.to(torch.int64)
    state = _mix(_mix(_mix(torch.zeros_like(seed), seed & _MASK), (seed >> 32) & _MASK), positions)
    state = _mix(state[:, None], col_indices[None, :]) ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK
    return state ^ (state >> 16)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", _murmur_hash32, "CPU")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU implementation here")

    return missing
