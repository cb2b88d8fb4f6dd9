#!/usr/bin/env python3
"""How many small faults in loss/, ops/ and training/data the tests notice: a mutation run with mutmut.

python tools/check/mutation_score.py                    400 mutants, the same each time
python tools/check/mutation_score.py --sample 0         all 5,000
python tools/check/mutation_score.py --only 'megatron_dppo.loss.advantages.*'

Needs mutmut and the built extension. [tool.mutmut] of pyproject.toml says what is mutated and which tests are asked. Mutants
stand in mutants/, which git ignores. Prints each survivor as a diff, and the share that was noticed with its 95 % interval.
A mutant that changes strings alone is counted apart: tests hold what a message names, not how it puts it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("megatron_dppo.loss.", "megatron_dppo.ops.", "megatron_dppo.training.data.", "")
# mutmut makes the mutants of all files before it runs those that it was asked for: these few are the first.
FIRST = "megatron_dppo.loss.regularisers.*"
UNNOTICED = {0: "survived", 33: "no test enters it"}  # exit codes; with any other a test failed, hung or crashed
LITERAL = re.compile(r"""[rf]*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""")


@dataclass(frozen=True)
class Mutant:
    """What was changed, and how the tests ended."""

    name: str
    exit_code: int
    diff: str

    @property
    def noticed(self) -> bool:
        """Whether a test failed, hung or crashed."""
        return self.exit_code not in UNNOTICED

    @property
    def only_wording(self) -> bool:
        """Whether nothing but what stands in strings has changed."""
        old, new = (
            [LITERAL.sub('""', line[1:]) for line in self.diff.splitlines() if line[0] == sign] for sign in "-+"
        )
        return old == new


def main(arguments: Sequence[str] | None = None) -> list[Mutant]:
    """Run, print, and return the mutants that were tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=400, help="how many mutants; 0: all (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--only", default="*", help="mutants whose name matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    run(options.jobs, FIRST)
    names = sorted(fnmatch.filter(exit_codes(), options.only))
    if 0 < options.sample < len(names):
        names = sorted(random.Random(options.seed).sample(names, options.sample))
    run(options.jobs, *names)
    found = exit_codes()
    tried = [Mutant(name, found[name], diff_of(name)) for name in names]
    for mutant in tried:
        if not mutant.noticed and not mutant.only_wording:
            print(f"\n{mutant.name}: {UNNOTICED[mutant.exit_code]}\n{mutant.diff}")
    print(table(tried))
    return tried


def run(jobs: int, *names: str) -> None:
    """Try these mutants."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs), *names]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=sys.stderr)


def exit_codes() -> dict[str, int]:
    """Of the tests, for each mutant that was made; None where it was not tried."""
    return {
        name: code
        for path in sorted(Path("mutants").rglob("*.meta"))
        for name, code in json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"].items()
    }


def diff_of(name: str) -> str:
    """The changed lines, with what stands around them."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant  # here: it reads the settings of the present folder

    lines = get_diff_for_mutant(name).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def table(tried: Sequence[Mutant]) -> str:
    """The shares, by package, in Markdown."""
    rows = ["| package | mutants | noticed | that change wording alone | noticed |", "|---|---|---|---|---|"]
    for package in PACKAGES:
        mutants = [mutant for mutant in tried if mutant.name.startswith(package)]
        cells = []
        for wording in (False, True):
            noticed = [mutant.noticed for mutant in mutants if mutant.only_wording is wording]
            cells += [str(len(noticed)), share(sum(noticed), len(noticed))]
        rows.append(f"| {' | '.join([package.strip('.') or 'all', *cells])} |")
    return "\n".join(rows)


def share(hits: int, trials: int) -> str:
    """In percent, with its 95 % interval (Wilson's score interval)."""
    if trials == 0:
        return "-"
    z, p = 1.96, hits / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return f"{100 * p:.1f} % ({100 * (middle - half):.1f} to {100 * (middle + half):.1f})"


if __name__ == "__main__":
    main()
