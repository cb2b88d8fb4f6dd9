"""Which part of which parameter this rank holds, by the names of hf/names.py, and how parts are cut and joined."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.utils import unwrap_model

from megatron_dppo.models.hf.names import EMBEDDING, OUTPUT_LAYER, expert_index

_SPLIT_ALONG_ROWS = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", EMBEDDING, OUTPUT_LAYER)
_SPLIT_ALONG_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def unwrapped(model_chunks: Sequence[torch.nn.Module]) -> list[GPTModel]:
    """The GPTModels inside of whatever wraps them (DistributedDataParallel, Float16Module)."""
    return list(unwrap_model(list(model_chunks)))


def local_parameters(model_chunks: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters with their whole-model names.

    A tied output layer on a pipeline stage of its own is a second copy of the embedding and carries its name.
    """
    found = []
    for model in unwrapped(model_chunks):
        for local_name, parameter in model.named_parameters():
            name = _whole_model_name(local_name, model)
            if name == OUTPUT_LAYER and model.share_embeddings_and_output_weights:
                name = EMBEDDING
            found.append((name, parameter))
    return found


def shard_group(name: str) -> dist.ProcessGroup:
    """The ranks between which a parameter is split: TP, or for an expert's matrices the expert TP group."""
    if expert_index(name) is None:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


def split_dimension(name: str) -> int | None:
    """The dimension along which a parameter is split, or None if every rank of ``shard_group`` has all of it."""
    if name.endswith(_SPLIT_ALONG_ROWS):
        return 0
    return 1 if name.endswith(_SPLIT_ALONG_COLUMNS) else None


def mark_split_parameters(model: GPTModel) -> None:
    """Set core's attributes of parameters that are split over tensor-parallel ranks.

    Core sets them where it initialises a weight, which ``build_policy`` has it skip. Without them a shard counts as a
    replica: its gradient would enter the global norm on the first rank only, and clipping would go by a wrong norm.
    """
    for name, parameter in local_parameters([model]):
        dimension = split_dimension(name)
        if dimension is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, dimension, _blocks(name))


def cut_shard(name: str, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """This rank's part of a whole parameter."""
    dimension = split_dimension(name)
    if dimension is None or size == 1:
        return whole
    return torch.cat([block.chunk(size, dimension)[rank] for block in whole.chunk(_blocks(name), dimension)], dimension)


def join_shards(name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole parameter from the parts of all ranks, in rank order."""
    dimension = split_dimension(name)
    if dimension is None or len(shards) == 1:
        return shards[0]
    blocks_of_rank = [shard.chunk(_blocks(name), dimension) for shard in shards]
    return torch.cat([block for blocks in zip(*blocks_of_rank, strict=True) for block in blocks], dimension)


def _blocks(name: str) -> int:
    """Gate and up projection are split separately, so that each rank has matching rows of both."""
    return 2 if name.endswith("linear_fc1.weight") else 1


def _whole_model_name(local_name: str, model: GPTModel) -> str:
    """Undo what the layer spec and the layout do to a name.

    Transformer Engine fuses a norm into the matrix behind it and groups the experts' matrices; pipeline stages and
    expert-parallel ranks count from 0.
    """
    # The local spec keeps the norm before the MLP out of linear_fc1; an MoE layer does in both.
    name = local_name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    name = re.sub(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r"mlp.experts.local_experts.\2.\1.weight", name)
    if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
        number = model.decoder.layers[int(layer[1])].layer_number - 1
        name = f"decoder.layers.{number}.{name[layer.end() :]}"
    if (expert := expert_index(name)) is not None:
        experts_per_rank = model.config.num_moe_experts // model.config.expert_model_parallel_size
        number = expert + experts_per_rank * parallel_state.get_expert_model_parallel_rank()
        name = name.replace(f"local_experts.{expert}.", f"local_experts.{number}.")
    return name
