"""Recorded calls of other frameworks, as JSON that a person can read: tests/integrations/records/NAME.json.

A tensor is {"dtype", "shape", "values"}; nine significant digits bring every fp32 back exactly, seventeen every fp64.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

RECORDS = Path(__file__).with_name("records")
DIGITS = {torch.float32: 9, torch.float64: 17}


def save(name: str, record: dict[str, Any]) -> None:
    """Write a record, one tensor a line."""
    text = json.dumps(_encoded(record), indent=1)
    flat = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    (RECORDS / f"{name}.json").write_text(flat + "\n", encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    """The record with its tensors."""
    return _decoded(json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8")))


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    digits = DIGITS.get(value.dtype)
    values = value.detach().cpu().flatten().tolist()
    if digits is not None:
        values = [_number(item, digits) for item in values]
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "values": values}


def _number(value: float, digits: int) -> float | int:
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e6 else short


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "shape", "values"}:
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])).view(value["shape"])
    return {key: _decoded(item) for key, item in value.items()}
