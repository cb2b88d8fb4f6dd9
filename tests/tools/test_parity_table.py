"""docs/parity.md is made from the results of the parity matrix."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "check" / "parity_table.py"))


def _entry(policy: str, gradient: float, core: str = "0.16.1", layout: str = "TP2") -> dict[str, Any]:
    column = {"aggregation": "token_mean", "loss": 1e-7, "grad_norm": 2e-7, "movement": 3e-7, "gradient": gradient}
    return {
        "date": "2026-01-02",
        "megatron_core": core,
        "torch": "2.13.0",
        "layout": layout,
        "ranks": 2,
        "policy": policy,
        "columns": [
            {**column, "batching": "padded", "fused_linear": False, "routing_replay": False},
            {**column, "batching": "packed", "fused_linear": True, "routing_replay": policy == "moe"},
        ],
    }


def test_a_cell_is_the_worst_of_all_policies_and_versions_have_tables_of_their_own() -> None:
    page = TOOL["render"]([_entry("dense", 1e-6), _entry("moe", 4e-6), _entry("dense", 2e-6, core="0.19.2")])
    assert (
        "| layout | ranks | policies | padded, logits | packed, fused linear | routing replay | grad norm | step |"
        in page
    )
    assert "| TP2 | 2 | dense, moe | 1e-07 / 4e-06 | 1e-07 / 1e-06 | 1e-07 / 4e-06 | 2e-07 | 3e-07 |" in page
    newer = page.split("## ")[2]
    assert newer.startswith("megatron-core 0.19.2, torch 2.13.0, 2026-01-02")
    assert "| TP2 | 2 | dense | 1e-07 / 2e-06 | 1e-07 / 2e-06 |" in newer


def test_a_repeated_comparison_replaces_the_earlier_one() -> None:
    page = TOOL["render"]([_entry("dense", 1e-1), _entry("dense", 1e-6)])
    assert "1e-01 |" not in page.split("## ")[1]
