"""The hash of a parameter from parts: any cut, any order, by the kernel or in torch; and what the servers' shim reports."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo.errors import WeightSyncError
from megatron_dppo.rollout.sglang import SGLangConfig, tile_hash
from megatron_dppo.rollout.sglang.servers import server
from megatron_dppo.rollout.sglang.tile_hash import Piece, TileSums, hash_pieces
from megatron_dppo.rollout.sglang.tile_hash_reference import TILE_WORDS, checksum

SHIM = Path(server.__file__).parents[1] / "cpu_shim"


@pytest.fixture(params=["compiled", "in torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in torch":
        monkeypatch.setattr(tile_hash, "native_operators", lambda device: None)
    else:
        pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")


def part(words: torch.Tensor, first: int, end: int) -> Piece:
    return Piece(words[None, first:end], 1, end - first, first)


def sums_of(words: torch.Tensor, *ranges: tuple[int, int]) -> TileSums:
    return hash_pieces({"p": (len(words), [part(words, *each) for each in ranges])})["p"]


def random_words(count: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32)


@settings(max_examples=60)
@given(
    num_words=st.sampled_from([1, 5, 8191, 8192, 8193, 3 * 8192 + 100, 5 * 8192]),
    cuts=st.lists(st.floats(0, 1), max_size=8),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_any_cut_in_any_order_gives_the_same(num_words: int, cuts: list[float], ranks: int, seed: int) -> None:
    """Pieces are dealt to ranks, which hash theirs in one go; what they send is merged in another order."""
    words = random_words(num_words)
    shuffled = random.Random(seed)
    edges = sorted({0, num_words, *(int(cut * num_words) for cut in cuts)})
    pieces = [part(words, first, end) for first, end in itertools.pairwise(edges)]
    shuffled.shuffle(pieces)
    sent = [hash_pieces({"p": (num_words, pieces[rank::ranks])})["p"].to_tensor() for rank in range(ranks)]
    shuffled.shuffle(sent)
    merged = TileSums(num_words)
    for tensor in sent:
        merged.merge(TileSums.from_tensor(tensor))
    assert merged.is_complete()
    assert merged.hexdigest() == checksum(words)


@pytest.mark.usefixtures("way")
def test_padded_shards_of_many_parameters_are_hashed_at_once() -> None:
    """A rank's columns of a down projection, rows of a vocabulary, and an expert behind another rank's."""
    down, embedding, expert = (torch.randn(shape).bfloat16() for shape in ((24, 80), (50, 16), (4, 2, 6)))
    padded_down = torch.cat([down[:, 40:], torch.zeros(24, 8)], 1).bfloat16()
    padded_embedding = torch.cat([embedding, torch.zeros(14, 16)]).bfloat16()
    hashes = hash_pieces(
        {
            "down": (24 * 48 // 2, [Piece(down[:, 40:], 24, 48, 0)]),
            ("embedding", 1): (64 * 16 // 2, [Piece(embedding, 64, 16, 0)]),
            "experts": (24, [Piece(expert[3], 2, 6, 18), Piece(expert[1], 2, 6, 6)]),
            "nothing": (7, []),
        }
    )
    assert hashes["down"].hexdigest() == checksum(padded_down)
    assert hashes["embedding", 1].hexdigest() == checksum(padded_embedding)
    assert hashes["experts"].missing_words() == [range(0, 6), range(12, 18)]
    assert hashes["nothing"].missing_words() == [range(0, 7)]
    others = hash_pieces({"experts": (24, [Piece(expert[2], 2, 6, 12), Piece(expert[0], 2, 6, 0)])})
    hashes["experts"].merge(others["experts"])
    assert hashes["experts"].hexdigest() == checksum(expert)


@pytest.mark.usefixtures("way")
def test_parts_of_a_parameter_beyond_2_to_the_32_words_know_their_place() -> None:
    num_words, first = 2**32 + 3 * TILE_WORDS, 2**32 - 100
    words = random_words(9000)
    whole = hash_pieces({"p": (num_words, [Piece(words[None], 1, 9000, first)])})["p"]
    parts = [Piece(words[None, a:b], 1, b - a, first + a) for a, b in ((7000, 9000), (0, 100), (100, 7000))]
    merged = TileSums(num_words)
    for piece in parts:
        merged.merge(hash_pieces({"p": (num_words, [piece])})["p"])
    assert merged.missing_words() == whole.missing_words() == [range(0, first), range(first + 9000, num_words)]
    assert sorted(merged.to_tensor().tolist()) == sorted(whole.to_tensor().tolist())


def test_what_is_sent_does_not_grow_with_the_parameter() -> None:
    words = random_words(20 * TILE_WORDS)
    sums = sums_of(words, (5, 9 * TILE_WORDS + 3), (11 * TILE_WORDS + 8, 20 * TILE_WORDS))
    assert len(sums.to_tensor()) == 3 + 2 * 2 + 3 * 3  # ranges, and the tiles at their ends but for the parameter's


def test_missing_words_are_named() -> None:
    sums = sums_of(random_words(9000), (10, 20), (20, 100), (8000, 8500))
    assert not sums.is_complete()
    assert sums.missing_words() == [range(0, 10), range(100, 8000), range(8500, 9000)]
    with pytest.raises(WeightSyncError, match="words 0 to 9 of 9000 were not hashed"):
        sums.hexdigest()


def test_nothing_is_missing_of_no_words() -> None:
    assert TileSums(0).hexdigest() == f"{0:016x}" == checksum(torch.zeros(0))


@pytest.mark.parametrize("other", [(99, 200), (0, 9000), (50, 51), (8000, 8200)])
def test_words_are_hashed_once(other: tuple[int, int]) -> None:
    words = random_words(9000)
    with pytest.raises(WeightSyncError, match=r"^p: words .* were hashed twice"):
        sums_of(words, (10, 100), (8100, 8300), other)
    sums = sums_of(words, (10, 100), (8100, 8300))
    before = sums.to_tensor()
    with pytest.raises(WeightSyncError, match=f"words {max(other[0], 10)} to|words 8100 to 8199"):
        sums.merge(sums_of(words, other))
    assert torch.equal(sums.to_tensor(), before)


def test_hashes_of_parameters_of_different_size_are_not_merged() -> None:
    with pytest.raises(WeightSyncError, match="a hash of 8 words cannot be part of one of 9"):
        TileSums(9).merge(TileSums(8))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (
            Piece(torch.zeros(3, 3).bfloat16(), 3, 3, 0),
            "p: 3 x 3 elements of torch.bfloat16 cannot be hashed: 18 bytes",
        ),
        (Piece(torch.zeros(3, 3), 3, 3, 4), "p: words 4 to 12 are not in a parameter of 12"),
        (Piece(torch.zeros(3, 3), 3, 3, -1), "p: words -1 to 7 are not in a parameter of 12"),
    ],
)
def test_a_piece_that_cannot_be_hashed_is_named(piece: Piece, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hash_pieces({"p": (12, [piece])})


_IN_THE_SERVER = """
import os, sys, types
import torch
from sglang.srt.utils import weight_checker
import sitecustomize
tensors = torch.load(sys.argv[1])
compiled = [f"{weight_checker.tensor_hash(tensor):016x}" for tensor in tensors]
os.environ.pop("MEGATRON_DPPO_TILE_HASH_LIBRARY", None)
sitecustomize._hash_as_on_a_gpu(weight_checker)
print(*compiled, *(f"{weight_checker.tensor_hash(tensor):016x}" for tensor in tensors))
assert "megatron_dppo" not in sys.modules
"""


def test_a_cpu_server_reports_the_hash_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's module is a stand-in here; the tests with real servers have its own. An odd number of halves is padded."""
    for folder in ("sglang", "sglang/srt", "sglang/srt/utils"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "sglang/srt/utils/weight_checker.py").write_text("tensor_hash = None")
    tensors = [torch.randn(3 * TILE_WORDS + 10), torch.randn(7, 9).bfloat16(), torch.randn(4, 6).t(), torch.zeros(0)]
    torch.save([tensor.cpu() for tensor in tensors], tmp_path / "tensors.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    environment = server.server_environment(SGLangConfig())
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(SHIM)
    library = environment.get("MEGATRON_DPPO_TILE_HASH_LIBRARY")
    assert (library is not None) == (tile_hash.native_operators(torch.device("cpu")) is not None)
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    command = [sys.executable, "-c", _IN_THE_SERVER, str(tmp_path / "tensors.pt")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [checksum(tensor) for tensor in tensors] * 2
