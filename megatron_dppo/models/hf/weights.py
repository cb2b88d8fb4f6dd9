"""Weights from and to Hugging Face checkpoints, for any tensor, pipeline and expert layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from megatron_dppo.distributed.collectives import gather_objects, on_one_rank
from megatron_dppo.errors import ConfigError
from megatron_dppo.models.build import padded_vocab_size, set_from_whole
from megatron_dppo.models.hf.config_json import fields_for_every_reader, read_json_object
from megatron_dppo.models.hf.dtype_names import dtype_name
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
_TRAINABLE_DTYPES = ("BF16", "F16", "F32", "F64")
_ROWS_COMPARED = 4096
_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
_TOKENIZER_FOLDERS = ("chat_templates", "additional_chat_templates")
_GENERATION_CONFIG = "generation_config.json"


@torch.no_grad()
def load_hf_weights(model_chunks: Sequence[torch.nn.Module], folder: str | Path) -> None:
    """Fill the policy from the safetensors files of a checkpoint folder, one parameter at a time.

    Each rank reads only what it holds a part of, but checks names and shapes of the whole checkpoint first, so that all
    ranks raise alike. Tensors are converted to the parameters' dtype.

    Raises:
        ConfigError: no safetensors in ``folder``, or several that contradict each other; a tensor is missing, not part of the
            model, of another shape or quantised; a tied output layer that is stored with other numbers.
    """
    hf_config = unwrapped(model_chunks)[0].hf_config
    checkpoint = _CheckpointReader(Path(folder))
    checkpoint.check_against(hf_config)
    for name, parameter in local_parameters(model_chunks):
        whole = from_hf(name, [checkpoint.read(hf) for hf in hf_names(name)], hf_config)
        set_from_whole(name, parameter, whole)


def check_hf_weights(folder: str | Path, hf_config: PretrainedConfig) -> None:
    """Raise ConfigError as ``load_hf_weights`` would, without a model and without reading more than the files' headers."""
    _CheckpointReader(Path(folder)).check_against(hf_config)


def checkpoint_tensors(folder: str | Path, hf_config: PretrainedConfig) -> Callable[[str], torch.Tensor]:
    """Reads a whole tensor of a checkpoint folder by its name there. Raises ConfigError as ``load_hf_weights`` does."""
    checkpoint = _CheckpointReader(Path(folder))
    checkpoint.check_against(hf_config)
    return checkpoint.read


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
    *,
    tokenizer_folder: str | Path | None = None,
    model_folder: str | Path | None = None,
    replace: bool = False,
) -> None:
    """Write the policy as a Hugging Face checkpoint: config, sharded safetensors with index, tokenizer files.

    A collective; rank 0 writes, first to ``<folder>.incomplete``, which is renamed when everything is on disk: a folder of
    the final name is always whole. If writing fails, every rank raises.

    Args:
        model_chunks: from ``build_policy``, wrapped or not.
        hf_config: written as config.json (see ``config_json.py``), with the weights' dtype.
        folder: must not exist yet, unless it is to be replaced.
        tokenizer_folder: a folder of which the tokenizer's files are copied.
        model_folder: the folder that the policy came from, of which generation_config.json is copied: it names the tokens
            that end a response.
        replace: put the new folder in the place of an old one, which is there until the new one is whole.

    Raises:
        ConfigError: ``folder`` exists.
        OSError: rank 0 could not write. Both, like anything else that fails there, on every rank.
    """
    folder = Path(folder)
    writer = _FolderWriter(folder, replace) if dist.get_rank() == 0 else None
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
        writer.add_small_files(hf_config, tokenizer_folder, model_folder)
        writer.finish()

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
        shape = padded_shape(name, hf_config, parallel_state.get_tensor_model_parallel_world_size())
        whole = torch.empty(shape, dtype=example.dtype, device=example.device)
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


def padded_shape(name: str, hf_config: PretrainedConfig, tensor_ranks: int) -> tuple[int, ...]:
    """Of the whole parameter, with the vocabulary rows that so many tensor-parallel ranks add to it."""
    shapes = hf_shapes(name, hf_config)
    rows = sum(shape[0] for shape in shapes)
    if name in (EMBEDDING, OUTPUT_LAYER):
        rows = padded_vocab_size(rows, tensor_ranks)
    return (rows, *shapes[0][1:])


def _attempt(step: Callable[..., None], *args: Any) -> Exception | None:
    try:
        step(*args)
    except Exception as error:
        return error
    return None


class _CheckpointReader:
    """The tensors of a checkpoint folder, read when asked for. A folder that can be read in two ways is refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        has_index, has_single = (folder / _INDEX).is_file(), (folder / _SINGLE_FILE).is_file()
        if has_index:
            self.file_of = self._read_index()
        elif has_single:
            self.file_of = dict.fromkeys(_opened(folder / _SINGLE_FILE).keys(), _SINGLE_FILE)
        else:
            raise ConfigError(
                f"{folder} has neither {_SINGLE_FILE} nor {_INDEX}: give a folder with a safetensors checkpoint"
            )
        stray = {file.name for file in folder.glob("model*.safetensors")} - {*self.file_of.values()}
        if stray:
            source = _INDEX if has_index else _SINGLE_FILE
            raise ConfigError(
                f"{folder} has {_first_few(stray)} beside {source}, which does not name it: remove what is not the model"
            )
        self.open_files = {file: self._open(file) for file in sorted(set(self.file_of.values()))}

    def _read_index(self) -> dict[str, str]:
        weight_map = read_json_object(self.folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{self.folder / _INDEX} has no weight_map")
        missing = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
        if missing:
            raise ConfigError(f"{self.folder / _INDEX} lists files that are not there: {', '.join(missing)}")
        return weight_map

    def _open(self, file: str) -> Any:
        opened = _opened(self.folder / file)
        held, listed = set(opened.keys()), {name for name, where in self.file_of.items() if where == file}
        for names, problem in ((listed - held, "the index says are there"), (held - listed, "the index does not name")):
            if names:
                raise ConfigError(
                    f"{self.folder / file}: {_first_few(names)}, which {problem}: they do not belong together"
                )
        return opened

    def read(self, hf_name: str) -> torch.Tensor:
        return self.open_files[self.file_of[hf_name]].get_tensor(hf_name)

    def check_against(self, hf_config: PretrainedConfig) -> None:
        """Raise ConfigError naming every kind of difference to what the model needs (the first few of each)."""
        expected = {
            hf: shape
            for name in parameter_names(hf_config)
            for hf, shape in zip(hf_names(name), hf_shapes(name, hf_config), strict=True)
        }
        missing = [name for name in expected if name not in self.file_of]
        unexpected = [name for name in self.file_of if name not in expected and not _is_redundant(name, hf_config)]
        misshapen, quantised = [], []
        for name in expected.keys() & self.file_of.keys():
            stored = self._slice(name)
            if tuple(stored.get_shape()) != expected[name]:
                misshapen.append(f"{name} is {list(stored.get_shape())}, the config asks for {list(expected[name])}")
            if stored.get_dtype() not in _TRAINABLE_DTYPES:
                quantised.append(f"{name} is {stored.get_dtype()}, not one of {', '.join(_TRAINABLE_DTYPES)}")
        problems = [
            f"{label}: {_first_few(names)}"
            for label, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", misshapen),
                ("of another kind of number", quantised),
            )
            if names
        ]
        if problems:
            raise ConfigError(f"the tensors in {self.folder} do not fit the model's config. " + "; ".join(problems))
        if hf_config.tie_word_embeddings:
            self._check_tied_copy()

    def _check_tied_copy(self) -> None:
        """A tied output layer may be in the file a second time, but not with other numbers: which would be meant?"""
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if head not in self.file_of:
            return
        ours, copy = self._slice(embedding), self._slice(head)
        same = ours.get_shape() == copy.get_shape() and all(
            torch.equal(ours[row : row + _ROWS_COMPARED], copy[row : row + _ROWS_COMPARED])
            for row in range(0, ours.get_shape()[0], _ROWS_COMPARED)
        )
        if not same:
            raise ConfigError(
                f"{self.folder}: config.json says tie_word_embeddings: true, but {head} differs from {embedding}. Set it to"
                f" false if the output layer was trained, or take {head} out of the file"
            )

    def _slice(self, hf_name: str) -> Any:
        return self.open_files[self.file_of[hf_name]].get_slice(hf_name)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors has an exception of its own
        raise ConfigError(f"{file} is no whole safetensors file: {error}") from error


def _first_few(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_redundant(hf_name: str, hf_config: PretrainedConfig) -> bool:
    """Tensors that old checkpoints repeat: a tied output layer, rotary frequencies."""
    return hf_name.endswith("rotary_emb.inv_freq") or (hf_name == "lm_head.weight" and hf_config.tie_word_embeddings)


class _FolderWriter:
    """Collects tensors into files of at most ``_MAX_FILE_BYTES`` and gives them their final names at the end."""

    def __init__(self, folder: Path, replace: bool) -> None:
        self.folder, self.incomplete = folder, folder.with_name(folder.name + ".incomplete")
        self.replace = replace
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.names_in_file: list[list[str]] = []
        self.total_bytes = 0
        self.dtype = torch.float32  # of the tensor added last

    def start(self) -> None:
        if self.folder.exists() and not self.replace:
            raise ConfigError(f"{self.folder} exists already: choose another folder, or remove it first")
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

    def add_small_files(
        self, hf_config: PretrainedConfig, tokenizer_folder: str | Path | None, model_folder: str | Path | None
    ) -> None:
        config = json.dumps(fields_for_every_reader(hf_config, dtype_name(self.dtype)), indent=2)
        (self.incomplete / "config.json").write_text(config + "\n", encoding="utf-8")
        if tokenizer_folder is not None:
            for pattern in _TOKENIZER_FILES:
                for file in filter(Path.is_file, Path(tokenizer_folder).glob(pattern)):
                    shutil.copy(file, self.incomplete / file.name)
            for name in _TOKENIZER_FOLDERS:
                if (Path(tokenizer_folder) / name).is_dir():
                    shutil.copytree(Path(tokenizer_folder) / name, self.incomplete / name)
        if model_folder is not None and (Path(model_folder) / _GENERATION_CONFIG).is_file():
            shutil.copy(Path(model_folder) / _GENERATION_CONFIG, self.incomplete / _GENERATION_CONFIG)

    def finish(self) -> None:
        self._write_pending()
        weight_map = {}
        for number, names in enumerate(self.names_in_file, start=1):
            file = f"model-{number:05d}-of-{len(self.names_in_file):05d}.safetensors"
            (self.incomplete / _unfinished_name(number)).rename(self.incomplete / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.incomplete / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        old = self.folder.with_name(self.folder.name + ".replaced")
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
        self.incomplete.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _write_pending(self) -> None:
        self.names_in_file.append(list(self.pending))
        save_file(self.pending, self.incomplete / _unfinished_name(len(self.names_in_file)), metadata={"format": "pt"})
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0


def _unfinished_name(number: int) -> str:
    return f"unfinished-{number:05d}.safetensors"
