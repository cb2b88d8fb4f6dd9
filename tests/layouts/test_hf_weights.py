"""A checkpoint means the same model in Megatron, in every layout: same logits, and out comes what went in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf import weights as hf_weights
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.weights import export_hf_weights, load_hf_weights, save_hf_checkpoint
from tests.models.policy_runs import (
    LOGITS_TOLERANCE,
    TWO_RANK_LAYOUTS,
    example_tokens,
    full_logits,
    loaded_policy,
    rows,
)
from tests.models.tiny_policies import KINDS, tiny_hf_model, write_tiny_hf_model
from tests.rank_pool import RankPools

FAST_LAYOUTS = [("qwen3_moe", "TP2 EP2"), ("qwen3_tied", "PP2 VPP2"), ("qwen2", "TP2")]
SLOW_LAYOUTS = [
    ("llama", "TP2"),
    ("llama", "PP2"),
    ("llama_tied", "TP2"),
    ("llama_tied", "PP2"),
    ("qwen3", "TP2"),
    ("qwen3", "PP2"),
    ("qwen3", "TP2 without sequence parallelism"),
    ("qwen3", "DP2"),
    ("qwen3", "CP2"),
    ("qwen3_tied", "PP2"),
    ("qwen3_moe", "PP2 VPP2"),
    ("qwen3_moe", "TP2"),
    ("qwen3_moe", "PP2"),
    ("qwen3_moe", "EP2"),
    ("qwen3_moe", "EP2 allgather"),
    ("qwen3_moe", "TP2 EP2 allgather"),
    ("qwen3_moe", "TP2 allgather"),
]


def _load_and_export(folder: str, layout: dict[str, Any]) -> tuple[torch.Tensor | None, list[str], bool]:
    """(logits, exported names, is every exported tensor the checkpoint's bit for bit)."""
    chunks = loaded_policy(folder, layout)
    logits = full_logits(chunks, rows(example_tokens()))
    stored = load_file(Path(folder) / "model.safetensors")
    names, exact = [], True
    for name, tensor in export_hf_weights(chunks):
        names.append(name)
        exact = exact and tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name])
    return torch.stack(logits) if logits else None, names, exact


def _check_against_hf(kind: str, layout: dict[str, Any], world_size: int, ranks: RankPools, folder: Path) -> None:
    # Every pipeline chunk has a layer of its own.
    write_tiny_hf_model(kind, folder, num_hidden_layers=2 * layout.get("virtual_pipeline_model_parallel_size", 1))
    results = ranks(world_size).run(_load_and_export, str(folder), layout)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(example_tokens()).logits
    compared = 0
    for logits, names, exact in results:
        assert exact
        assert sorted(names) == sorted(load_file(folder / "model.safetensors"))
        if logits is not None:
            compared += 1
            torch.testing.assert_close(
                logits[..., :250], expected, rtol=0, atol=LOGITS_TOLERANCE * expected.abs().max().item()
            )
            assert (logits[..., 250:] == 0).all(), "padded vocabulary rows are zero"
    assert compared >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_has_the_logits_and_weights_of_the_checkpoint(kind: str, ranks: RankPools, tmp_path: Path) -> None:
    _check_against_hf(kind, {}, 1, ranks, tmp_path)


@pytest.mark.parametrize(("kind", "layout"), FAST_LAYOUTS)
def test_two_ranks_have_the_logits_and_weights_of_the_checkpoint(
    kind: str, layout: str, ranks: RankPools, tmp_path: Path
) -> None:
    _check_against_hf(kind, TWO_RANK_LAYOUTS[layout], 2, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), SLOW_LAYOUTS)
def test_other_layouts_have_the_logits_and_weights_of_the_checkpoint(
    kind: str, layout: str, ranks: RankPools, tmp_path: Path
) -> None:
    _check_against_hf(kind, TWO_RANK_LAYOUTS[layout], 2, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
        },
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
            "moe_token_dispatcher": "allgather",
        },
    ],
    ids=["PP2 TP2 EP2", "PP2 EP2", "PP2 VPP2 TP2", "TP2 EP2 ETP2", "TP2 EP2 ETP2 allgather"],
)
def test_four_ranks_have_the_logits_and_weights_of_the_checkpoint(
    layout: dict[str, int], ranks: RankPools, tmp_path: Path
) -> None:
    _check_against_hf("qwen3_moe", layout, 4, ranks, tmp_path)


def test_scaled_rope_and_unnormalised_routing_match(ranks: RankPools, tmp_path: Path) -> None:
    """Positions lie beyond the wavelengths that Llama 3's scaling changes only if theta is small for so short a text."""
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 1e6,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    variants = {
        "llama": {"rope_parameters": llama3, "max_position_embeddings": 65536},
        "qwen3_moe": {"norm_topk_prob": False},
    }
    for kind, overrides in variants.items():
        folder = write_tiny_hf_model(kind, tmp_path / kind, **overrides)
        logits, _, _ = ranks(1).run(_load_and_export, str(folder), {})[0]
        with torch.no_grad():
            expected = tiny_hf_model(kind, **overrides)(example_tokens()).logits
            without = tiny_hf_model(kind)(example_tokens()).logits
        tolerance = LOGITS_TOLERANCE * expected.abs().max().item()
        assert (expected - without).abs().max() > 10 * tolerance, "the variant must make a difference to be tested"
        torch.testing.assert_close(logits[..., :250], expected, rtol=0, atol=tolerance)


def _exported_names(folder: str, layout: dict[str, Any]) -> list[str]:
    return [name for name, _ in export_hf_weights(loaded_policy(folder, layout))]


def test_export_comes_in_the_documented_order_on_every_rank(ranks: RankPools, tmp_path: Path) -> None:
    write_tiny_hf_model("qwen3_moe", tmp_path)
    first, second = ranks(2).run(_exported_names, str(tmp_path), TWO_RANK_LAYOUTS["EP2"])
    assert first == second
    assert first[0] == "model.embed_tokens.weight"
    assert first[-2:] == ["model.norm.weight", "lm_head.weight"]
    experts = [name for name in first if name.startswith("model.layers.1.mlp.experts.")]
    assert experts == [
        f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
        for expert in range(4)
        for part in ("gate", "up", "down")
    ]
    attention = [name for name in first if name.startswith("model.layers.0.self_attn.") and "_proj" in name]
    assert [name.split(".")[-2][0] for name in attention] == ["q", "k", "v", "o"]


def _save_then_check_nothing_else(folder: str, target: str, layout: dict[str, Any], max_file_bytes: int) -> None:
    hf_weights._MAX_FILE_BYTES = max_file_bytes
    chunks = loaded_policy(folder, layout)
    save_hf_checkpoint(chunks, load_hf_config(folder), target, tokenizer_folder=folder)


def test_saved_checkpoint_is_read_by_transformers_and_by_us(ranks: RankPools, tmp_path: Path) -> None:
    source, target = write_tiny_hf_model("qwen3_moe", tmp_path / "source"), tmp_path / "target"
    (source / "tokenizer.json").write_text("{}")
    ranks(2).run(_save_then_check_nothing_else, str(source), str(target), TWO_RANK_LAYOUTS["TP2 EP2"], 100_000)

    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files == sorted(file.name for file in target.glob("*.safetensors"))
    assert (target / "tokenizer.json").is_file()
    assert not list(tmp_path.glob("*.incomplete"))

    again = AutoModelForCausalLM.from_pretrained(target)
    for name, tensor in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    names = ranks(1).run(_load_sharded, str(target), str(source))[0]
    assert set(names) == set(index["weight_map"])


def _load_sharded(folder: str, single_file_folder: str) -> list[str]:
    chunks = loaded_policy(folder, {})
    stored = load_file(Path(single_file_folder) / "model.safetensors")
    names = []
    for name, tensor in export_hf_weights(chunks):
        names.append(name)
        assert torch.equal(tensor, stored[name]), name
    return names


def _save_error(folder: str, target: str) -> str:
    chunks = loaded_policy(folder, TWO_RANK_LAYOUTS["TP2"])
    try:
        save_hf_checkpoint(chunks, load_hf_config(folder), target)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_save_that_fails_on_rank_0_is_an_error_on_every_rank(ranks: RankPools, tmp_path: Path) -> None:
    source, target = write_tiny_hf_model("llama", tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    messages = ranks(2).run(_save_error, str(source), str(target))
    assert all("exists already" in message for message in messages), messages


def _replace_twice(folder: str, target: str) -> list[str]:
    """An export over an older one, then one that fails half-way."""
    chunks, hf_config = loaded_policy(folder, {}), load_hf_config(folder)
    with torch.no_grad():
        chunks[0].decoder.final_layernorm.weight.fill_(7.0)
    save_hf_checkpoint(chunks, hf_config, target, model_folder=folder, replace=True)
    with torch.no_grad():
        chunks[0].decoder.final_layernorm.weight.fill_(8.0)
    try:
        save_hf_checkpoint(chunks, hf_config, target, tokenizer_folder=f"{folder}/config.json/x", replace=True)
    except Exception as error:
        return [type(error).__name__]
    return []


def test_an_export_takes_the_place_of_an_older_one_once_it_is_whole(ranks: RankPools, tmp_path: Path) -> None:
    source, target = write_tiny_hf_model("llama", tmp_path / "source"), tmp_path / "target"
    (source / "generation_config.json").write_text('{"eos_token_id": 9}')
    target.mkdir()
    (target / "old.txt").write_text("")
    ranks(1).run(_replace_twice, str(source), str(target))
    norms = [load_file(file).get("model.norm.weight") for file in target.glob("*.safetensors")]
    assert [float(norm[0]) for norm in norms if norm is not None] in ([7.0], [8.0])
    assert not (target / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def _load_error(folder: str) -> str:
    initialize_model_parallel(ParallelConfig(), seed=1)
    chunks = build_policy(load_hf_config(folder), ParallelConfig(), torch.float32)
    try:
        load_hf_weights(chunks, folder)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_checkpoint_that_does_not_fit_is_refused_by_tensor_name(ranks: RankPools, tmp_path: Path) -> None:
    write_tiny_hf_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:249].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    message = ranks(1).run(_load_error, str(tmp_path))[0]
    assert "missing: model.norm.weight" in message
    assert "unexpected: model.layers.7.mlp.up_proj.weight" in message
    assert "lm_head.weight is [249, 64], the config asks for [250, 64]" in message


def test_a_folder_without_weights_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    write_tiny_hf_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in ranks(1).run(_load_error, str(tmp_path))[0]


def _bf16_round_trip(folder: str) -> bool:
    initialize_model_parallel(ParallelConfig(**TWO_RANK_LAYOUTS["TP2"]), seed=1)
    parallel = ParallelConfig(**TWO_RANK_LAYOUTS["TP2"])
    chunks = build_policy(load_hf_config(folder), parallel, torch.bfloat16)
    load_hf_weights(chunks, folder)
    stored = load_file(Path(folder) / "model.safetensors")
    return all(torch.equal(tensor, stored[name].bfloat16()) for name, tensor in export_hf_weights(chunks))


def test_a_bf16_policy_exports_the_rounded_checkpoint(ranks: RankPools, tmp_path: Path) -> None:
    write_tiny_hf_model("qwen3", tmp_path)
    assert ranks(2).run(_bf16_round_trip, str(tmp_path)) == [True, True]


def _wrapped_export(folder: str) -> bool:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    parallel = ParallelConfig()
    initialize_model_parallel(parallel, seed=1)
    chunks = build_policy(load_hf_config(folder), parallel, torch.bfloat16)
    config = chunks[0].config
    wrapped = [
        DistributedDataParallel(config, DistributedDataParallelConfig(), Float16Module(config, chunk))
        for chunk in chunks
    ]
    load_hf_weights(wrapped, folder)
    plain = {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}
    return all(torch.equal(tensor, plain[name]) for name, tensor in export_hf_weights(wrapped)) and bool(plain)


def test_wrapped_policies_are_accepted(ranks: RankPools, tmp_path: Path) -> None:
    write_tiny_hf_model("qwen3", tmp_path)
    assert ranks(1).run(_wrapped_export, str(tmp_path)) == [True]
