"""The operator that looks for impossible values: the first token of each kind, in any chunk, whatever the threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("megatron_dppo.ops.native_backend", reason="the extension megatron_dppo._C is not built")
from megatron_dppo import _C
from megatron_dppo.ops.backend import choose_backend

VOCAB, K = 50, 3
N = 2000  # several chunks of a CPU thread's, several blocks of a GPU's
TOLERANCES = {"log_prob_tolerance": 1e-3, "mass_tolerance": 1e-3}
IMPOSSIBLE = {
    "target": ("target", [-1, VOCAB]),
    "advantages": ("advantages", [math.nan, math.inf, -math.inf]),
    "log_mu": ("log_mu", [math.nan, 0.25, -math.inf]),
    "topk_ids": ("topk_ids", [-1, VOCAB]),
    "topk_log_mu": ("topk_log_mu", [math.nan, 0.25]),
    "ref_log_prob": ("ref_log_prob", [math.nan, math.inf, -math.inf]),
}
NOTHING = [-1.0, 0.0, 0.0]


def tokens() -> dict[str, Any]:
    return {
        "target": torch.randint(0, VOCAB, (N,)),
        "advantages": torch.randn(N),
        "log_mu": -torch.rand(N),
        "mask": torch.arange(N) % 5 != 2,
        "topk_ids": torch.randint(0, VOCAB, (N, K)),
        "topk_log_mu": torch.full((N, K), -2.0),
        "ref_log_prob": -torch.rand(N),
    }


def records(backend: str, given: dict[str, Any]) -> dict[str, list[float]]:
    operators = choose_backend(backend, torch.zeros(1)).operators
    assert operators is not None
    record = operators.check_tokens(**given, vocab_size=VOCAB, **TOLERANCES)
    return dict(zip(_C.check_names, record.tolist(), strict=True))


@pytest.mark.parametrize("check", IMPOSSIBLE)
@pytest.mark.parametrize("first", [0, 511, 513, N - 1])
def test_the_first_bad_token_is_found_with_its_value(check: str, first: int, compiled_backend: str) -> None:
    field, values = IMPOSSIBLE[check]
    for value in values:
        given = tokens()
        bad = torch.cat([torch.tensor([2, first]), torch.randint(first, N, (20,))])  # token 2 is outside the mask
        given["mask"][first] = True
        given[field][(bad, 1) if given[field].dim() == 2 else bad] = value
        found = records(compiled_backend, given)
        # NaN, if that is what it is, equals itself here.
        assert str(found[check]) == str([float(first), float(value), float(given["target"][first])])
        others = {name: row for name, row in found.items() if name not in (check, "topk_mass")}
        assert all(row == NOTHING for row in others.values())


def test_the_top_k_must_not_hold_more_than_everything(compiled_backend: str) -> None:
    given = tokens()
    given["topk_log_mu"][778] = math.log(0.334)  # three of them
    given["topk_log_mu"][333] = math.log(0.3333)
    position, mass, _ = records(compiled_backend, given)["topk_mass"]
    assert position == 778
    assert mass == pytest.approx(1.002, rel=1e-6)


def test_what_is_not_given_is_not_looked_at_and_certainty_is_possible(compiled_backend: str) -> None:
    given = tokens() | {"mask": None, "ref_log_prob": None}
    given["topk_log_mu"][5] = torch.tensor([0.0, -math.inf, -math.inf])
    given["log_mu"][6] = 5e-4  # rounding
    without = given | {"topk_ids": None, "topk_log_mu": None}
    nobody = {name: None if values is None else values[:0] for name, values in given.items()}
    for inputs in (given, without, nobody):
        assert list(records(compiled_backend, inputs).values()) == [NOTHING] * len(_C.check_names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(2, 2, dtype=torch.int64)}, "target must be a vector"),
        ({"target": torch.zeros(N)}, "target must be Long"),
        ({"advantages": torch.zeros(4)}, "advantages must have shape"),
        ({"log_mu": torch.zeros(N, dtype=torch.float64)}, "log_mu must be Float"),
        ({"mask": torch.ones(N)}, "mask must be Bool"),
        ({"topk_ids": None}, "topk_ids and topk_log_mu must be given together"),
        ({"topk_log_mu": torch.zeros(N, K + 1)}, "topk_log_mu must have shape"),
        ({"ref_log_prob": torch.zeros(2 * N)[::2]}, "ref_log_prob must be contiguous"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {**tokens(), "vocab_size": VOCAB, **change}
    with pytest.raises(ValueError, match=message):
        torch.ops.megatron_dppo.check_tokens(**arguments, **TOLERANCES)
