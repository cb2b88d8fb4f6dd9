"""Expected checksums: the hashes themselves, and the faults that a comparison finds."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest
import torch

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.models.hf.export import NamedShape
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums, hash_tensors
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape, ServerLayout
from megatron_dppo.rollout.sglang.tile_hash_reference import checksum
from tests.rollout.sglang.conftest import SERVER_PYTHON

ONE_RANK = ServerLayout(tp_size=1, device_type="cpu", ep_size=1, attention_tp_size=1, lm_head_tp_size=1)
SHAPE = ModelShape(num_key_value_heads=2, num_experts=2, tie_word_embeddings=True)
LAYER = "model.layers.0."
TENSORS = {
    f"{LAYER}self_attn.q_proj.weight": (8, 4),
    f"{LAYER}self_attn.k_proj.weight": (4, 4),
    f"{LAYER}self_attn.v_proj.weight": (4, 4),
    f"{LAYER}mlp.experts.0.gate_proj.weight": (32, 4),
    f"{LAYER}mlp.experts.0.up_proj.weight": (32, 4),
    f"{LAYER}mlp.experts.0.down_proj.weight": (4, 32),
    f"{LAYER}mlp.experts.1.gate_proj.weight": (32, 4),
    f"{LAYER}mlp.experts.1.up_proj.weight": (32, 4),
    f"{LAYER}mlp.experts.1.down_proj.weight": (4, 32),
    "model.norm.weight": (4,),
}


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in TENSORS.items()}


def _reported(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """What a server with these weights on one rank would report, by concatenation."""
    experts = [f"{LAYER}mlp.experts.{e}." for e in range(2)]
    parameters = {
        f"{LAYER}self_attn.qkv_proj.weight": [f"{LAYER}self_attn.{kind}_proj.weight" for kind in "qkv"],
        f"{LAYER}mlp.experts.w13_weight": [f"{e}{kind}_proj.weight" for e in experts for kind in ("gate", "up")],
        f"{LAYER}mlp.experts.w2_weight": [f"{e}down_proj.weight" for e in experts],
        "model.norm.weight": ["model.norm.weight"],
    }
    return {p: checksum(torch.cat([weights[name].flatten() for name in names])) for p, names in parameters.items()}


def _named_shapes(weights: dict[str, torch.Tensor]) -> list[NamedShape]:
    return [NamedShape(name, tuple(tensor.shape)) for name, tensor in weights.items()]


def _expected(weights: dict[str, torch.Tensor], layout: ServerLayout = ONE_RANK) -> ExpectedChecksums:
    expected = ExpectedChecksums(_named_shapes(weights), SHAPE, layout, torch.float32)
    hash_tensors([expected], weights.items())
    return expected


def test_the_order_of_the_export_does_not_matter():
    weights = _weights()
    backwards = dict(reversed(weights.items()))
    for order in (weights, backwards):
        assert _expected(order).compare([(0, _reported(weights))]) == []


@pytest.mark.parametrize("victim", list(TENSORS))
def test_every_changed_tensor_is_found_and_named(victim):
    weights = _weights()
    held = {**weights, victim: weights[victim] + 1e-6}
    (fault,) = _expected(weights).compare([(0, _reported(held))])
    assert victim in fault


@pytest.mark.parametrize("victim", list(TENSORS))
def test_every_missing_tensor_is_found_and_named(victim):
    weights = _weights()
    sent = {name: tensor for name, tensor in weights.items() if name != victim}
    (fault,) = _expected(sent).compare([(0, _reported(weights))])
    assert victim in fault
    assert "never sent" in fault


def test_a_tensor_that_the_server_does_not_know_is_named():
    weights = {**_weights(), "model.layers.7.strange.weight": torch.zeros(4)}
    (fault,) = _expected(weights).compare([(0, _reported(weights))])
    assert fault == "model.layers.7.strange.weight was sent, but the server has no parameter for it"


def test_a_tensor_that_is_there_twice_is_refused():
    shapes = _named_shapes(_weights())
    with pytest.raises(WeightSyncError, match=r"k_proj\.weight is exported twice"):
        ExpectedChecksums([*shapes, shapes[1]], SHAPE, ONE_RANK, torch.float32)


def test_a_tensor_sent_twice_is_refused():
    expected = _expected(_weights())
    with pytest.raises(WeightSyncError, match=r"k_proj\.weight.*was sent twice"):
        hash_tensors([expected], [(f"{LAYER}self_attn.k_proj.weight", torch.zeros(4, 4))])


def test_a_tensor_that_was_planned_but_not_sent_is_found():
    weights = _weights()
    expected = ExpectedChecksums(_named_shapes(weights), SHAPE, ONE_RANK, torch.float32)
    hash_tensors([expected], [item for item in weights.items() if "k_proj" not in item[0]])
    (fault,) = expected.compare([(0, _reported(weights))])
    assert "k_proj.weight" in fault


def test_what_several_senders_have_hashed_adds_up():
    weights = _weights()
    items = list(weights.items())
    parts = []
    for sender in range(3):
        part = ExpectedChecksums(_named_shapes(weights), SHAPE, ONE_RANK, torch.float32)
        hash_tensors([part], items[sender::3])
        parts.append(part)
    for part in parts[1:]:
        parts[0].add_tensor(part.to_tensor())
    assert parts[0].compare([(0, _reported(weights))]) == []


LAYOUTS = {
    "TP2": ServerLayout(2, "cuda", ep_size=1, attention_tp_size=2, lm_head_tp_size=2),
    "TP2 EP2": ServerLayout(2, "cuda", ep_size=2, attention_tp_size=2, lm_head_tp_size=2),
    "DP attention": ServerLayout(2, "cuda", ep_size=1, attention_tp_size=1, lm_head_tp_size=2),
    "DP attention, EP2": ServerLayout(2, "cuda", ep_size=2, attention_tp_size=1, lm_head_tp_size=1),
    "TP4 EP2": ServerLayout(4, "cuda", ep_size=2, attention_tp_size=4, lm_head_tp_size=4),
}


def _held_by(rank: int, weights: dict[str, torch.Tensor], layout: ServerLayout) -> dict[str, str]:
    """What a rank reports, from the layout's description: cut each tensor, put the parts together."""

    def part(name: str, dim: int, shards: int, index: int) -> torch.Tensor:
        return weights[name].chunk(shards, dim)[index].flatten()

    attention, index = layout.attention_tp_size, rank % layout.attention_tp_size
    key_value = min(attention, SHAPE.num_key_value_heads)
    of_key_value = index * key_value // attention
    qkv = [part(f"{LAYER}self_attn.q_proj.weight", 0, attention, index)]
    qkv += [part(f"{LAYER}self_attn.{kind}_proj.weight", 0, key_value, of_key_value) for kind in "kv"]
    expert_tp = layout.tp_size // layout.ep_size
    experts = [rank // expert_tp] if layout.ep_size == 2 else [0, 1]
    w13 = [
        part(f"{LAYER}mlp.experts.{e}.{kind}_proj.weight", 0, expert_tp, rank % expert_tp)
        for e in experts
        for kind in ("gate", "up")
    ]
    w2 = [part(f"{LAYER}mlp.experts.{e}.down_proj.weight", 1, expert_tp, rank % expert_tp) for e in experts]
    held = {
        f"{LAYER}self_attn.qkv_proj.weight": torch.cat(qkv),
        f"{LAYER}mlp.experts.w13_weight": torch.cat(w13),
        f"{LAYER}mlp.experts.w2_weight": torch.cat(w2),
        "model.norm.weight": weights["model.norm.weight"],
        "lm_head.weight": part("lm_head.weight", 0, layout.lm_head_tp_size, rank % layout.lm_head_tp_size),
        "model.embed_tokens.weight": part("model.embed_tokens.weight", 0, attention, index),
    }
    return {parameter: checksum(tensor) for parameter, tensor in held.items()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_of_a_server_holds_what_its_layout_says(layout):
    weights = _weights() | {name: torch.randn(256, 4) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    untied = replace(SHAPE, tie_word_embeddings=False)
    expected = ExpectedChecksums(_named_shapes(weights), untied, layout, torch.float32)
    hash_tensors([expected], weights.items())
    reported = [(rank, _held_by(rank, weights, layout)) for rank in range(layout.tp_size)]
    assert expected.compare([*reported, *reported]) == []
    assert expected.compare(reported[:1]) == [f"ranks [0] reported checksums instead of {layout.tp_size} ranks"]
    rank, held = reported[-1]
    wrong = [*reported, (rank, held | {f"{LAYER}mlp.experts.w2_weight": "0" * 16})]
    (fault,) = expected.compare(wrong)
    assert "down_proj.weight" in fault


def test_an_output_layer_that_shares_the_embedding_is_not_expected():
    weights = _weights()
    sent = {**weights, "lm_head.weight": torch.zeros(64, 4)}
    assert _expected(sent).compare([(0, _reported(weights))]) == []


# The kernel that a GPU server runs, interpreted on the CPU: the one witness of that hash without a GPU. Its file is loaded
# by itself, because importing all of SGLang takes far longer.
_INTERPRET = """
import importlib.util, sys, torch, triton
path = importlib.util.find_spec("sglang").submodule_search_locations[0] + "/kernels/ops/memory/gpu_tensor_hash.py"
spec = importlib.util.spec_from_file_location("gpu_tensor_hash", path)
m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
seed = 0x243F6A88
for data in torch.load(sys.argv[1]):
    words = data.view(torch.int32).view(torch.uint32)
    partials = torch.empty(triton.cdiv(words.numel(), 8192), dtype=torch.uint64)
    m.hash_tiles32_kernel_blocked[(partials.numel(),)](
        words, partials, words.numel(), seed1=seed, seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
        FM_C1=m.FMIX32_C1, FM_C2=m.FMIX32_C2, POS_A=m.POS_C1, POS_B=m.POS_C2, TILE=8192, BLOCK=256, USE_CG=False)
    print(f"{m._final_splitmix64(sum(partials.tolist())):016x}")
"""


@pytest.mark.sglang
@pytest.mark.slow
def test_the_gpu_hash_is_that_of_sglangs_kernel(tmp_path):
    tensors = [torch.randn(numel) for numel in (100, 8192, 2 * 8192 + 777)]
    torch.save(tensors, tmp_path / "data.pt")
    command = [SERVER_PYTHON, "-c", _INTERPRET, tmp_path / "data.pt"]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [checksum(tensor) for tensor in tensors]
