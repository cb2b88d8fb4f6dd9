"""What ranks of test_faults.py run: the example script, in which one fault of faults.py happens to one rank, or nothing.

Arguments: the name of the fault (or "none"), the ranks that it happens to, the silence after which a rank is taken to be dead
(or an empty text), and those of the example script. When the fault happens, the time is left in the file ``fault`` of the
present folder.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from megatron_dppo.distributed import lifeline
from megatron_dppo.training import run
from megatron_dppo.training.trainer import Trainer
from tests.training.faults import BY_NAME, STEP, Fault
from tests.training.scorer_in_this_process import ScorerInThisProcess


def let_happen(fault: Fault) -> None:
    """From now on ``fault.function`` is one in which it happens, once."""
    module_name, _, path = fault.function.partition(":")
    owner: Any = importlib.import_module(module_name)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    generate_and_score = Trainer.generate_and_score
    armed = False

    def in_step(trainer: Trainer) -> Any:
        nonlocal armed
        armed = trainer.state.step + 1 == STEP
        return generate_and_score(trainer)

    @functools.wraps(original)
    def with_fault(*arguments: Any, **named: Any) -> Any:
        nonlocal armed
        call = functools.partial(original, *arguments, **named)
        if not armed:
            return call()
        armed = False
        with Path("fault").open("a") as file:
            file.write(f"{time.monotonic()}\n")
        return fault.happens(call)

    Trainer.generate_and_score = in_step  # type: ignore[method-assign]
    setattr(owner, name, with_fault)


name, ranks, silence = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)
fault = BY_NAME.get(name)
if silence:
    lifeline._SILENCE_S = float(silence)  # type: ignore[misc]
if fault is None or not fault.scorer_in_processes:
    run.Scorer = ScorerInThisProcess  # type: ignore[misc, attr-defined]
if fault is not None and os.environ["RANK"] in ranks.split(","):
    let_happen(fault)
runpy.run_path(str(Path(__file__).parents[2] / "examples" / "pretrain_dppo.py"), run_name="__main__")
