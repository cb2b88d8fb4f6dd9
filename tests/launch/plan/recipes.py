"""Policies and recipes that the tests of the plan have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGURATIONS = Path(__file__).parents[3] / "examples" / "conf"
QUICKSTART = CONFIGURATIONS / "quickstart.yaml"
H100_RECIPE = CONFIGURATIONS / "qwen3_30b_a3b.yaml"

DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
MOE = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def model_folder(folder: Path, fields: dict[str, Any]) -> str:
    """Its config.json alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 40960, **fields}))
    return str(folder)
