"""What Hugging Face calls dtypes."""

from __future__ import annotations

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``: the name that config.json, checkpoints and servers use."""
    return str(dtype).removeprefix("torch.")
