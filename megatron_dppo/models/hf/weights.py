"""Weights from and to Hugging Face checkpoints, for any tensor, pipeline and expert layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from megatron_dppo.distributed.collectives import gather_objects, on_one_rank
from megatron_dppo.models.build import padded_vocab_size, set_from_whole
from megatron_dppo.models.hf.config import ARCHITECTURES, dtype_name
from megatron_dppo.models.hf.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    expert_index,
    from_hf,
    hf_names,
    hf_shapes,
    layer_index,
    parameter_names,
    to_hf,
)
from megatron_dppo.models.sharding import (
    join_shards,
    local_parameters,
    shard_group,
    split_dimension,
    unwrapped,
)

_INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_MAX_FILE_BYTES = 5 * 2**30
_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


@torch.no_grad()
def load_hf_weights(model_chunks: Sequence[torch.nn.Module], folder: str | Path) -> None:
    """Fill the policy from the safetensors files of a checkpoint folder, one parameter at a time.

    Each rank reads only what it holds a part of, but checks names and shapes of the whole checkpoint first, so that all
    ranks raise alike. Tensors are converted to the parameters' dtype.

    Raises:
        ValueError: no safetensors in ``folder``; a tensor is missing, not part of the model or of another shape.
    """
    hf_config = unwrapped(model_chunks)[0].hf_config
    checkpoint = _CheckpointReader(Path(folder))
    checkpoint.check_against(hf_config)
    for name, parameter in local_parameters(model_chunks):
        whole = from_hf(name, [checkpoint.read(hf) for hf in hf_names(name)], hf_config)
        set_from_whole(name, parameter, whole)


@torch.no_grad()
def export_hf_weights(model_chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the whole model as (checkpoint name, full tensor), bit for bit what the ranks hold.

    **A collective**: all ranks of the model must draw from it to the end, at the same time; all get the same tensors, on
    their own device. Layers come in order, experts by index, gate before up, query before key before value; a tied
    output layer and padded vocabulary rows are left out. A tensor may be a view of the live parameter: clone it to keep
    it beyond the next optimizer step.
    """
    chunks = unwrapped(model_chunks)
    hf_config = chunks[0].hf_config
    local: dict[str, torch.Tensor] = {}
    for name, parameter in local_parameters(model_chunks):
        local.setdefault(name, parameter.detach())
    stage_of_layer = _pipeline_stages(local)
    example = next(iter(local.values()))
    for name in parameter_names(hf_config):
        layer = layer_index(name)
        if layer is not None:
            stage = stage_of_layer[layer]
        else:
            stage = 0 if name.startswith("embedding.") else parallel_state.get_pipeline_model_parallel_world_size() - 1
        whole = _gather_whole(name, local.get(name), stage, hf_config, example)
        yield from to_hf(name, whole, hf_config)


def save_hf_checkpoint(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: PretrainedConfig,
    folder: str | Path,
    tokenizer_folder: str | Path | None = None,
) -> None:
    """Write the policy as a Hugging Face checkpoint: config, sharded safetensors with index, tokenizer files.

    A collective; rank 0 writes, first to ``<folder>.incomplete``, which is renamed when everything is on disk: a folder of
    the final name is always whole. If writing fails, every rank raises.

    Args:
        model_chunks: from ``build_policy``, wrapped or not.
        hf_config: written as config.json, with the weights' dtype.
        folder: must not exist yet.
        tokenizer_folder: a checkpoint folder, of which the tokenizer's files are copied.

    Raises:
        ValueError: ``folder`` exists.
        OSError: rank 0 could not write. Both, like anything else that fails there, on every rank.
    """
    folder = Path(folder)
    writer = _FolderWriter(folder) if dist.get_rank() == 0 else None
    error: Exception | None = None
    if writer is not None:
        error = _attempt(writer.start)
    for name, tensor in export_hf_weights(model_chunks):
        # Rank 0 goes on drawing after an error: the others wait for it in collectives.
        if writer is not None and error is None:
            error = _attempt(writer.add, name, tensor)

    def finish() -> None:
        assert writer is not None
        if error is not None:
            raise error
        writer.finish(hf_config, tokenizer_folder)

    on_one_rank(finish)


def _pipeline_stages(local: dict[str, torch.Tensor]) -> dict[int, int]:
    """The pipeline stage that holds each layer."""
    layers = sorted({layer for name in local if (layer := layer_index(name)) is not None})
    group = parallel_state.get_pipeline_model_parallel_group()
    layers_of_stage = gather_objects(layers, group=group)
    return {layer: stage for stage, layers in enumerate(layers_of_stage) for layer in layers}


def _gather_whole(
    name: str, shard: torch.Tensor | None, stage: int, hf_config: PretrainedConfig, example: torch.Tensor
) -> torch.Tensor:
    """The whole parameter on every rank: joined where its shards are, then sent over EP (experts) and PP.

    ``shard`` is None on ranks that hold nothing of it; ``example`` gives dtype and device.
    """
    pipeline, expert = parallel_state.get_pipeline_model_parallel_group(), expert_index(name)
    on_stage = pipeline.rank() == stage
    expert_owner = 0
    if expert is not None:
        experts = parallel_state.get_expert_model_parallel_group()
        expert_owner = expert // (hf_config.num_experts // experts.size())
    if on_stage and (expert is None or experts.rank() == expert_owner):
        if shard is None:
            raise RuntimeError(f"{name} is not on the rank that should hold it: was the pipeline split by hand?")
        whole = _join_over_group(name, shard)
    else:
        whole = torch.empty(_padded_shape(name, hf_config), dtype=example.dtype, device=example.device)
    if expert is not None and experts.size() > 1 and on_stage:
        dist.broadcast(whole, dist.get_global_rank(experts, expert_owner), group=experts)
    if pipeline.size() > 1:
        dist.broadcast(whole, dist.get_global_rank(pipeline, stage), group=pipeline)
    return whole


def _join_over_group(name: str, shard: torch.Tensor) -> torch.Tensor:
    group = shard_group(name)
    if split_dimension(name) is None or group.size() == 1:
        return shard.contiguous()
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return join_shards(name, shards)


def _padded_shape(name: str, hf_config: PretrainedConfig) -> tuple[int, ...]:
    shapes = hf_shapes(name, hf_config)
    rows = sum(shape[0] for shape in shapes)
    if name in (EMBEDDING, OUTPUT_LAYER):
        rows = padded_vocab_size(rows, parallel_state.get_tensor_model_parallel_world_size())
    return (rows, *shapes[0][1:])


def _attempt(step: Callable[..., None], *args: Any) -> Exception | None:
    try:
        step(*args)
    except Exception as error:
        return error
    return None


class _CheckpointReader:
    """The tensors of a checkpoint folder, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / _INDEX).is_file():
            self.file_of = dict(json.loads((folder / _INDEX).read_text())["weight_map"])
        elif (folder / _SINGLE_FILE).is_file():
            with safe_open(folder / _SINGLE_FILE, framework="pt") as file:
                self.file_of = dict.fromkeys(file.keys(), _SINGLE_FILE)
        else:
            raise ValueError(
                f"{folder} has neither {_SINGLE_FILE} nor {_INDEX}: give a folder with a safetensors checkpoint"
            )
        missing = sorted({file for file in self.file_of.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(f"{folder / _INDEX} lists files that are not there: {', '.join(missing)}")
        self.open_files = {
            file: safe_open(folder / file, framework="pt") for file in sorted(set(self.file_of.values()))
        }

    def read(self, hf_name: str) -> torch.Tensor:
        return self.open_files[self.file_of[hf_name]].get_tensor(hf_name)

    def check_against(self, hf_config: PretrainedConfig) -> None:
        """Raise ValueError naming every kind of difference to what the model needs (the first few of each)."""
        expected = {
            hf: shape
            for name in parameter_names(hf_config)
            for hf, shape in zip(hf_names(name), hf_shapes(name, hf_config), strict=True)
        }
        missing = [name for name in expected if name not in self.file_of]
        unexpected = [name for name in self.file_of if name not in expected and not _is_redundant(name, hf_config)]
        misshapen = []
        for name in expected.keys() & self.file_of.keys():
            shape = tuple(self.open_files[self.file_of[name]].get_slice(name).get_shape())
            if shape != expected[name]:
                misshapen.append(f"{name} is {list(shape)}, the config asks for {list(expected[name])}")
        problems = [
            f"{label}: {', '.join(sorted(names)[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        ]
        if problems:
            raise ValueError(f"the tensors in {self.folder} do not fit the model's config. " + "; ".join(problems))


def _is_redundant(hf_name: str, hf_config: PretrainedConfig) -> bool:
    """Tensors that old checkpoints repeat: a tied output layer, rotary frequencies."""
    return hf_name.endswith("rotary_emb.inv_freq") or (hf_name == "lm_head.weight" and hf_config.tie_word_embeddings)


class _FolderWriter:
    """Collects tensors into files of at most ``_MAX_FILE_BYTES`` and gives them their final names at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.incomplete = folder, folder.with_name(folder.name + ".incomplete")
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.names_in_file: list[list[str]] = []
        self.total_bytes = 0
        self.dtype = torch.float32  # of the tensor added last

    def start(self) -> None:
        if self.folder.exists():
            raise ValueError(f"{self.folder} exists already: choose another folder, or remove it first")
        shutil.rmtree(self.incomplete, ignore_errors=True)
        self.incomplete.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > _MAX_FILE_BYTES:
            self._write_pending()
        # A clone: gate and up projection are views of one tensor, which safetensors refuses to write.
        self.pending[name] = tensor.to("cpu", copy=True).contiguous()
        self.pending_bytes += size
        self.dtype = tensor.dtype

    def finish(self, hf_config: PretrainedConfig, tokenizer_folder: str | Path | None) -> None:
        self._write_pending()
        weight_map = {}
        for number, names in enumerate(self.names_in_file, start=1):
            file = f"model-{number:05d}-of-{len(self.names_in_file):05d}.safetensors"
            (self.incomplete / _unfinished_name(number)).rename(self.incomplete / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.incomplete / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        config = type(hf_config).from_dict({**hf_config.to_dict(), "dtype": dtype_name(self.dtype)})
        config.architectures = hf_config.architectures or [ARCHITECTURES[hf_config.model_type]]
        config.save_pretrained(self.incomplete)
        if tokenizer_folder is not None:
            for pattern in _TOKENIZER_FILES:
                for tokenizer_file in Path(tokenizer_folder).glob(pattern):
                    shutil.copy(tokenizer_file, self.incomplete / tokenizer_file.name)
        self.incomplete.rename(self.folder)

    def _write_pending(self) -> None:
        self.names_in_file.append(list(self.pending))
        save_file(self.pending, self.incomplete / _unfinished_name(len(self.names_in_file)), metadata={"format": "pt"})
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0


def _unfinished_name(number: int) -> str:
    return f"unfinished-{number:05d}.safetensors"
