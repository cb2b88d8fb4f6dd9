"""What ranks of short runs execute: the example script, with grading in the ranks' own processes."""

from __future__ import annotations

import runpy
from pathlib import Path

from megatron_dppo.training import run
from tests.training.scorer_in_this_process import ScorerInThisProcess

run.Scorer = ScorerInThisProcess  # type: ignore[misc, attr-defined]
runpy.run_path(str(Path(__file__).parents[2] / "examples" / "pretrain_dppo.py"), run_name="__main__")
