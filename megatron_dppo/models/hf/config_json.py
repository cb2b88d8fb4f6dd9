"""config.json: its fields as they stand there, and written so that old and new readers take the same numbers from it.

transformers 5 renamed fields (``rope_parameters``, ``dtype``, ``num_local_experts``) and writes the new names only. A reader
of the old ones finds nothing and takes a default without a word: a theta of 10000, 128 experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_dppo.errors import ConfigError


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The fields of a folder's config.json as they stand there. Raises ConfigError if there is none."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ConfigError(f"no config.json in {folder}: give the local folder of a Hugging Face checkpoint")
    return read_json_object(file)


def read_json_object(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises ConfigError if it holds anything else."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} holds a {type(fields).__name__}, not a JSON object")
    return fields


def config_json(hf_config: PretrainedConfig, dtype: torch.dtype, architecture: str) -> dict[str, Any]:
    """The fields of config.json for a policy with weights of ``dtype``: each renamed one under its old name as well.

    Fields that transformers does not know stay as they were read.
    """
    fields: dict[str, Any] = json.loads(hf_config.to_json_string())
    for old_name, name in hf_config.attribute_map.items():
        if name in fields:
            fields[old_name] = fields[name]
    rope = {name: value for name, value in rope_parameters(hf_config).items() if name != "type"}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        **fields,
        "architectures": hf_config.architectures or [architecture],
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "dtype": dtype_name(dtype),
        "torch_dtype": dtype_name(dtype),
    }


def rope_parameters(hf_config: PretrainedConfig) -> dict[str, Any]:
    """``rope_type``, ``rope_theta`` and what a scaling adds, from transformers 5's field or the older ones."""
    rope = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", getattr(hf_config, "rope_theta", 10000.0))
    return rope


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``: the name that config.json, checkpoints and servers use."""
    return str(dtype).removeprefix("torch.")
