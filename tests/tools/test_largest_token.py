"""One token with an impossible or tiny log-prob: what it takes of a step's gradient, and that docs/algorithm.md says so."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dppo.training.config.schema import Config

ROOT = Path(__file__).parents[2]
largest_token = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "bench" / "largest_token.py")))

pytestmark = pytest.mark.slow
SIGNS = pytest.mark.parametrize("advantage", [1.0, -1.0])
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", largest_token.DIVERGENCES)


@EVERY_DIVERGENCE
@SIGNS
def test_a_token_whose_probability_the_engine_lost_is_left_out(divergence: str, advantage: float) -> None:
    assert largest_token.share(divergence, -3.4e38, advantage, as_trainer=False) > 0.999_999
    assert largest_token.share(divergence, -3.4e38, advantage, as_trainer=True) == 0


@EVERY_DIVERGENCE
@SIGNS
@pytest.mark.parametrize(("reported", "owned"), [(-18.0, 0.999), (-12.0, 0.9)])
def test_a_rare_token_is_bounded_by_the_cap(reported: float, owned: float, divergence: str, advantage: float) -> None:
    """Below the floor or not, no divergence masks it; its ratio e^(-7 - reported) is above the trainer's cap C. With C for r,
    its squared gradient is (C / r)^2 times what it was, and the other tokens' is unchanged.
    """
    alone = largest_token.share(divergence, reported, advantage, as_trainer=False)
    assert alone > owned
    cap = Config().algorithm.loss.ratio_cap
    assert cap is not None
    squared = alone / (1 - alone) * (cap / math.exp(-7 - reported)) ** 2
    # exp of a difference of 11 in single precision: 11 half-ulps of 1, squared, beside those of the sums
    expected = squared / (1 + squared)
    assert largest_token.share(divergence, reported, advantage, as_trainer=True) == pytest.approx(expected, rel=1e-4)
    assert expected < 0.1


def test_the_table_of_the_docs_is_what_the_benchmark_prints() -> None:
    page = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    for reported in largest_token.REPORTED:
        for advantage in (1.0, -1.0):
            assert largest_token.row(reported, advantage) in page
