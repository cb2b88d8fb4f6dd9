"""What a GPU could do at best: dense bf16 products of matrices with fp32 sums, per second."""

from __future__ import annotations

import torch

# A part of the name that the driver gives -> operations per second, from the manufacturer's data sheets, without sparsity.
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,  # SXM
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
}


def peak_flops() -> float | None:
    """Of this process's GPU; None on a CPU, or of a GPU that is not known here."""
    if not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(device_name: str) -> float | None:
    """Of a GPU of this name: the longest entry that is a part of it."""
    known = [part for part in _PEAKS if part in device_name]
    return _PEAKS[max(known, key=len)] if known else None
