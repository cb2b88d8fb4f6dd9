"""config.json: its fields as they stand there, and written so that old and new readers take the same numbers from it.

transformers 5 has renamed fields (``rope_parameters``, ``dtype``, ``num_local_experts``) and writes the new names only. A
reader of the old names then finds nothing and takes a default of its own, without a word: another rope theta, say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megatron_dppo.errors import ConfigError

# Fields that transformers reads from a config.json but keeps under another name, which `fields_for_every_reader` undoes.
_RENAMED = {"rope_theta", "rope_scaling", "torch_dtype"}
# The attribute under which a config carries what transformers has no use for.
_LEFT_OUT = "left_out_fields"


def read_json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ConfigError if it holds anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text
        raise ConfigError(f"{file} is not valid JSON ({error}): write it again, or take the original") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}, not an object with fields: take the original file")
    return value


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The fields of a folder's config.json as they stand there. Raises ConfigError if there is none."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ConfigError(f"no config.json in {folder}: give the local folder of a Hugging Face checkpoint")
    return read_json_object(file)


def rope_parameters(hf_config: PretrainedConfig) -> dict[str, Any]:
    """``rope_type``, ``rope_theta`` and what scales them, from transformers 5's field or from the older ones."""
    rope = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", getattr(hf_config, "rope_theta", 10000.0))
    return rope


def keep_left_out_fields(hf_config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    """Let ``hf_config`` carry those of the ``fields`` it was made from that transformers leaves out of it."""
    kept = hf_config.to_dict().keys() | hf_config.attribute_map.keys() | _RENAMED
    left_out = {name: value for name, value in fields.items() if name not in kept and not name.startswith("_")}
    if left_out:
        setattr(hf_config, _LEFT_OUT, left_out)


def fields_for_every_reader(hf_config: PretrainedConfig, dtype: str) -> dict[str, Any]:
    """What config.json says of a model whose weights are ``dtype``: each renamed field under its old name as well.

    Fields of the original config.json that transformers does not know, or leaves out, are there too.
    """
    fields: dict[str, Any] = json.loads(hf_config.to_json_string())
    fields.update(fields.pop(_LEFT_OUT, {}))
    for old_name, name in hf_config.attribute_map.items():
        if name in fields:
            fields[old_name] = fields[name]
    rope = rope_parameters(hf_config)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        **fields,
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
