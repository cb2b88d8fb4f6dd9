#!/usr/bin/env python3
"""Writes the batch scripts that tests/launch compares with: one for every recipe, at its true size. Look at what changes."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_dppo.launch.recipes import RECIPES
from tests.launch.test_slurm_script import SCRIPTS, kept_script


def main() -> None:
    SCRIPTS.mkdir(exist_ok=True)
    for old in SCRIPTS.glob("*.sbatch"):
        old.unlink()
    for path in sorted(RECIPES.glob("*.yaml")):
        (SCRIPTS / f"{path.stem}.sbatch").write_text(kept_script(path.stem))


if __name__ == "__main__":
    main()
