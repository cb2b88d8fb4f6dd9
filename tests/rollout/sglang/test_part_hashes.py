"""A wrong tensor is named where a server has one hash for many: by what the server's plugin says of its parts.

test_server_layouts.py and test_senders.py have real servers with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_dppo.models.hf.export import NamedShape
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums, hash_tensors
from megatron_dppo.rollout.sglang.mismatch import Mismatch, hash_parts_again
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape, ServerLayout
from megatron_dppo.rollout.sglang.part_hashes import parts_of, request_for
from megatron_dppo.rollout.sglang.server_plugin import part_hashes as plugin
from megatron_dppo.rollout.sglang.tile_hash_reference import checksum
from megatron_dppo.rollout.whole_weights import WholeWeights

LAYER = "model.layers.0."
EXPERTS = 4
SHAPE = ModelShape(num_key_value_heads=2, num_experts=EXPERTS, tie_word_embeddings=True)
# Experts on two ranks, each with a half of them; attention split over both. Padding as on a CPU: 40 becomes 64.
LAYOUT = ServerLayout(2, "cpu", ep_size=2, attention_tp_size=2, lm_head_tp_size=2)
QKV, W13, W2 = f"{LAYER}self_attn.qkv_proj.weight", f"{LAYER}mlp.experts.w13_weight", f"{LAYER}mlp.experts.w2_weight"


def weights() -> dict[str, torch.Tensor]:
    shapes = {f"{LAYER}self_attn.{kind}_proj.weight": (8, 4) for kind in "qkv"}
    for expert in range(EXPERTS):
        for kind, shape in (("gate", (40, 4)), ("up", (40, 4)), ("down", (4, 40))):
            shapes[f"{LAYER}mlp.experts.{expert}.{kind}_proj.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def held_by(rank: int, of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a rank, from the description of the layout."""

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        full = torch.zeros([64 if size == 40 else size for size in tensor.shape])
        full[: tensor.shape[0], : tensor.shape[1]] = tensor
        return full

    experts = [f"{LAYER}mlp.experts.{expert}." for expert in range(2 * rank, 2 * rank + 2)]
    gate_up = [torch.cat([padded(of[f"{e}{kind}_proj.weight"]) for kind in ("gate", "up")]) for e in experts]
    return {
        QKV: torch.cat([of[f"{LAYER}self_attn.{kind}_proj.weight"].chunk(2)[rank] for kind in "qkv"]),
        W13: torch.stack(gate_up),
        W2: torch.stack([padded(of[f"{e}down_proj.weight"]) for e in experts]),
    }


class Checker:
    """What SGLang's ``WeightChecker`` is to the plugin, on one rank."""

    def __init__(self, rank: int, tensors: dict[str, torch.Tensor]) -> None:
        self._placement = {"tp_rank": rank}
        self._tensors = tensors

    def _model_state(self) -> list[tuple[str, torch.Tensor]]:
        return list(self._tensors.items())

    def handle(self, action: str, *, skip_tensor_list: list[str] | None = None, role: str = "target") -> dict:
        skipped = skip_tensor_list or []
        hashes = {
            name: checksum(tensor)
            for name, tensor in self._tensors.items()
            if not any(pattern in name for pattern in skipped)
        }
        return {"checksums": hashes, "per_gpu_checksum": "", "parallelism_info": {"role": role}}


@pytest.fixture(autouse=True)
def _sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function that the plugin takes from there."""
    checker = SimpleNamespace(_hash_tensor=checksum)
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.utils", SimpleNamespace(weight_checker=checker))


Answer = Callable[[list[Checker], str], list[tuple[int, dict[str, str]]]]


def with_plugin(ranks: list[Checker], request: str) -> list[tuple[int, dict[str, str]]]:
    answers = [
        plugin.hash_parts(Checker.handle, checker, action="checksum", skip_tensor_list=[request]) for checker in ranks
    ]
    return [(rank, answer["checksums"]) for rank, answer in enumerate(answers)]


def without(ranks: list[Checker], request: str) -> list[tuple[int, dict[str, str]]]:
    return [
        (rank, checker.handle("checksum", skip_tensor_list=[request])["checksums"])
        for rank, checker in enumerate(ranks)
    ]


def message(held: dict[str, torch.Tensor], answer: Answer) -> list[str]:
    """The lines of the error, when ``weights`` were sent and ``held`` are there."""
    sent = weights()
    expected = ExpectedChecksums([NamedShape(n, tuple(t.shape)) for n, t in sent.items()], SHAPE, LAYOUT, torch.float32)
    hash_tensors([expected], sent.items())
    ranks = [Checker(rank, held_by(rank, held)) for rank in range(2)]
    reported = [(rank, checker.handle("checksum")["checksums"]) for rank, checker in enumerate(ranks)]
    parts = parts_of(expected, expected.differing(reported))
    mismatch = Mismatch("http://a", expected.faults(reported), LAYOUT, parts, answer(ranks, request_for(parts)))
    source = WholeWeights(sent)
    buckets = source.buckets(dtype=torch.float32, bucket_bytes=1000, max_senders=1)
    hashes = hash_parts_again(mismatch, expected, source, buckets, torch.float32, lambda work: None)
    return str(mismatch.error(hashes)).splitlines()[1:]


@pytest.mark.parametrize("victim", list(weights()))
def test_of_many_tensors_in_a_parameter_the_wrong_one_is_named(victim: str) -> None:
    held = weights()
    held[victim][-1, -1] += 1e-6
    parameter = QKV if "self_attn" in victim else W2 if "down" in victim else W13
    assert message(held, with_plugin) == [f"  {victim}: the server's {parameter} differs from what was exported"]


def test_all_that_are_wrong_are_named_each_with_its_parameter() -> None:
    held, experts = weights(), f"{LAYER}mlp.experts"
    swapped = [f"{experts}.{expert}.up_proj.weight" for expert in (0, 3)]
    held[swapped[0]], held[swapped[1]] = held[swapped[1]], held[swapped[0]]
    held[f"{experts}.1.down_proj.weight"].zero_()
    assert message(held, with_plugin) == [
        f"  {', '.join(swapped)}: the server's {W13} differs from what was exported",
        f"  {experts}.1.down_proj.weight: the server's {W2} differs from what was exported",
    ]


def test_of_a_server_without_the_plugin_the_parameter_is_named() -> None:
    held = weights()
    held[f"{LAYER}mlp.experts.2.up_proj.weight"].zero_()
    (line,) = message(held, without)
    assert "(8 tensors)" in line
    assert W13 in line


def test_what_the_plugin_is_not_asked_is_answered_as_always() -> None:
    checker = Checker(0, held_by(0, weights()))
    for skipped in (None, [], ["w13"]):
        answer = plugin.hash_parts(Checker.handle, checker, action="checksum", skip_tensor_list=skipped)
        assert answer == checker.handle("checksum", skip_tensor_list=skipped)
