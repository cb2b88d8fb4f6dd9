"""tools/check/mutation_score.py: the tests of loss/, ops/ and training/data notice most of the faults that are put there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tools.check import mutation_score
from tools.check.mutation_score import Mutant

# The same of 5,000 each time, until the code changes. dev/LOG.md has the share of a larger sample.
SAMPLE, LEAST = 60, 0.75


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.skipif(
    importlib.util.find_spec("mutmut") is None, reason="mutmut is not installed (pip install -e '.[dev]')"
)
def test_most_small_faults_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path.cwd())  # back again behind the test
    tried = [mutant for mutant in mutation_score.main(["--sample", str(SAMPLE)]) if not mutant.only_wording]
    assert len(tried) > 0.7 * SAMPLE
    assert sum(mutant.noticed for mutant in tried) >= LEAST * len(tried)


@pytest.mark.parametrize(
    ("old", "new", "only_wording"),
    [
        ('raise ValueError(f"{n} is too many")', 'raise ValueError(f"XX{n} is too manyXX")', True),
        ("raise ValueError('no')", "raise ValueError('NO')", True),
        ('raise ValueError("no")', "raise ValueError(None)", False),
        ("return x < 1", "return x <= 1", False),
        ("check(x, strict=True)", "check(x, )", False),
    ],
)
def test_a_change_of_strings_alone_is_one_of_wording(old: str, new: str, only_wording: bool) -> None:
    mutant = Mutant("megatron_dppo.loss.x__mutmut_1", 0, f" def f():\n-    {old}\n+    {new}\n     ")
    assert mutant.only_wording is only_wording


def test_what_no_test_enters_was_not_noticed_and_what_ended_otherwise_was() -> None:
    codes = {0: False, 33: False, 1: True, 36: True, -11: True}
    assert {code: Mutant("m", code, "").noticed for code in codes} == codes


def test_a_share_comes_with_its_interval() -> None:
    assert mutation_score.share(112, 128) == "87.5 % (80.7 to 92.2)"
    assert mutation_score.share(10, 10) == "100.0 % (72.2 to 100.0)"
    assert mutation_score.share(0, 0) == "-"
