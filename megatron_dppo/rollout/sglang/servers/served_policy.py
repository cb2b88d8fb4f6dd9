"""What servers serve: the policy's folder as they are to see it, and how they compute."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_dppo.models.hf.config_json import read_config_json


@dataclass(frozen=True)
class ServedPolicy:
    """The policy, for those who start servers.

    Attributes:
        model_folder: its Hugging Face checkpoint.
        dtype: that servers compute in, by SGLang's name: ``bfloat16``.
        return_routed_experts: whether servers keep expert choices, to be asked for.
    """

    model_folder: Path
    dtype: str
    return_routed_experts: bool = False


def prepare_served_folder(model_folder: Path, target: Path) -> Path:
    """Make ``target`` a view of ``model_folder`` (links) in which no end-of-sequence token is configured.

    SGLang always stops at the model's own eos_token_id, whereas a rollout ends at SamplingParams.stop_token_ids and
    nowhere else. The generation config, which could also switch on top-p sampling, is left out altogether.
    """
    config = read_config_json(model_folder)
    shutil.rmtree(target, ignore_errors=True)  # links that an earlier run made, maybe to another model
    target.mkdir(parents=True)
    for source in model_folder.iterdir():
        if source.name not in ("config.json", "generation_config.json"):
            (target / source.name).symlink_to(source.resolve())
    config["eos_token_id"] = None
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target
