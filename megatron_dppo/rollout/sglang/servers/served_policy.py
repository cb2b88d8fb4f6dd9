"""What servers serve: the policy's folder as they are to see it, and how they compute."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.config_json import read_config_json


@dataclass(frozen=True)
class ServedPolicy:
    """The policy, for those who start servers.

    Attributes:
        model_folder: its Hugging Face checkpoint.
        dtype: that servers compute in, by SGLang's name: ``bfloat16``.
        return_routed_experts: whether servers keep expert choices, to be asked for.
        fp32_head: whether servers in 16 bits leave their logits in fp32.
    """

    model_folder: Path
    dtype: str
    return_routed_experts: bool = False
    fp32_head: bool = False

    @classmethod
    def of_trainer(
        cls,
        model_folder: str | Path,
        trained_in: str,
        *,
        served_in: str | None,
        return_routed_experts: bool,
        fp32_head: bool,
    ) -> ServedPolicy:
        """The policy whose logits are rounded as the trainer's are: to 16 bits, or not at all.

        Args:
            model_folder: the checkpoint.
            trained_in: the trainer's dtype. fp32 logits go with float32, whatever ``fp32_head`` says.
            served_in: the servers' dtype; None: the same.
            return_routed_experts: whether servers keep expert choices.
            fp32_head: the trainer leaves the logits of 16-bit hidden states in fp32.

        Raises:
            ConfigError: the trainer rounds and servers in this dtype do not.
        """
        dtype, fp32_logits = served_in or trained_in, fp32_head or trained_in == "float32"
        if dtype == "float32" and not fp32_logits:
            raise ConfigError(
                "rollout.sglang.dtype=float32 leaves the servers' logits in fp32, and model.fp32_head=false rounds the"
                " trainer's to 16 bits: set model.fp32_head=true, or serve in 16 bits"
            )
        return cls(Path(model_folder), dtype, return_routed_experts, fp32_logits and dtype != "float32")


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
