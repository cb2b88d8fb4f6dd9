"""checkpoint.json: what a checkpoint was written from, readable without loading a tensor."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import PretrainedConfig

from megatron_dppo.errors import CheckpointError, ConfigError
from megatron_dppo.models.hf.config import architecture, load_hf_config
from megatron_dppo.models.hf.config_json import read_json_object
from megatron_dppo.models.hf.dtype_names import dtype_name
from megatron_dppo.training.checkpoint.optimizer_state import optimizer_steps
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy

_FILE = "checkpoint.json"
_FORMAT = 1


@dataclass
class TrainerState:
    """Where the loop stands.

    Attributes:
        step: completed training steps.
        weight_version: of the weights that the rollout engine was given last.
        prompts_drawn: position in the stream of training prompts.
    """

    step: int = 0
    weight_version: int = 0
    prompts_drawn: int = 0


@dataclass(frozen=True)
class CheckpointInfo:
    """The part of a checkpoint that is not tensors.

    Attributes:
        trainer: where the loop stood.
        optimizer_steps: steps that optimizer and schedule had taken. 0: the checkpoint has no optimizer state.
        dtype: of the weights, e.g. "bfloat16".
        hf_config: the whole configuration of the model.
        layout: sizes of the parallel groups; with another layout the checkpoint loads all the same, but random states
            start from the seed.
        packages: versions that wrote it.
        fp32_head: whether 16-bit hidden states had fp32 logits; checkpoints from before that was possible do not say so.
        format: of the folder; an unknown one is refused.
    """

    trainer: TrainerState
    optimizer_steps: int
    dtype: str
    hf_config: dict[str, Any]
    layout: dict[str, int]
    packages: dict[str, str]
    fp32_head: bool = False
    format: int = _FORMAT

    def write(self, folder: Path) -> None:
        """Write checkpoint.json, and return when it is on disk."""
        with (folder / _FILE).open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=2)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> CheckpointInfo:
        """Read checkpoint.json. Raises CheckpointError if there is none of a known format."""
        if not (folder / _FILE).is_file():
            raise CheckpointError(
                f"{folder} has no {_FILE}: give the folder of a checkpoint, <run>/checkpoints/step_<N>"
            )
        try:
            fields = read_json_object(folder / _FILE)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        if fields.get("format") != _FORMAT:
            raise CheckpointError(
                f"{folder} is of format {fields.get('format')}, this version reads format {_FORMAT}: use the version of"
                f" megatron_dppo that wrote it ({fields.get('packages', {}).get('megatron-dppo', 'unknown')})"
            )
        return cls(**{**fields, "trainer": TrainerState(**fields["trainer"])})

    def check_model(
        self,
        folder: Path,
        hf_config: PretrainedConfig,
        dtype: torch.dtype | None = None,
        fp32_head: bool | None = None,
    ) -> None:
        """Raise CheckpointError if the checkpoint is of another model, or of another dtype or head where they are given.

        No shape depends on the head, but all numbers of the run that goes on would be others. fp32 models have one head only.
        """
        try:
            saved = architecture(load_hf_config(self.hf_config))
        except ConfigError as error:
            raise CheckpointError(f"{folder}: the model that its {_FILE} describes cannot be built: {error}") from error
        present = architecture(hf_config)
        differences = [
            f"{name} is {saved.get(name)}, the policy's is {present.get(name)}"
            for name in {**saved, **present}
            if saved.get(name) != present.get(name)
        ]
        if dtype is not None and self.dtype != dtype_name(dtype):
            differences.append(f"its weights are {self.dtype}, the policy's are {dtype_name(dtype)} (model.dtype)")
        elif dtype in (torch.bfloat16, torch.float16) and fp32_head not in (None, self.fp32_head):
            differences.append(f"model.fp32_head was {_yaml(self.fp32_head)}, and is {_yaml(fp32_head)} now")
        if differences:
            raise CheckpointError(
                f"{folder} is of another model: {'; '.join(differences)}. Resume with the model settings of the run's"
                " config.yaml, or set run.name to start a new run"
            )


def describe(policy: TrainablePolicy, optimizer_state: OptimizerState | None, trainer: TrainerState) -> CheckpointInfo:
    """What there is to say of a checkpoint that this rank is about to write a part of."""
    return CheckpointInfo(
        trainer=TrainerState(**asdict(trainer)),
        optimizer_steps=0 if optimizer_state is None else _steps_taken(optimizer_state),
        dtype=dtype_name(policy.dtype),
        hf_config=json.loads(policy.hf_config.to_json_string(use_diff=False)),
        layout=present_layout(policy),
        fp32_head=policy.fp32_head,
        packages={
            "megatron-dppo": own_version(),
            "megatron-core": megatron.core.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    )


def own_version() -> str:
    """Of this package, for the record; a checkout on PYTHONPATH has no metadata."""
    try:
        return version("megatron-dppo")
    except PackageNotFoundError:
        return "not installed"


def _yaml(value: bool | None) -> str:
    return str(value).lower()


def present_layout(policy: TrainablePolicy) -> dict[str, int]:
    """Sizes of the parallel groups, as they stand in checkpoint.json."""
    return {
        "ranks": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "chunks_per_stage": len(policy.chunks),
        "context": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
        "distributed_optimizer": int(policy.uses_distributed_optimizer),
    }


def _steps_taken(optimizer_state: OptimizerState) -> int:
    """Adam's count and the schedule's are one number, which is what a checkpoint holds."""
    scheduled, taken = int(optimizer_state.scheduler.num_steps), optimizer_steps(optimizer_state.optimizer)
    if scheduled and not taken <= {scheduled}:
        raise RuntimeError(f"the schedule is at step {scheduled}, but Adam at {sorted(taken)}")
    return scheduled
