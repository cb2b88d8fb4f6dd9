"""The one exit code of a run whose processes ended with many."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from megatron_dppo.distributed.lifeline import EXIT_ANOTHER_FAILED
from megatron_dppo.errors import EXIT_BAD_INPUT, EXIT_START_AGAIN, EXIT_STOPPED

# A run that has saved goes on whatever became of a process on its way out; who only says that another has failed, or was
# ended by whoever found that, knows the cause least.
_MOST_TELLING = (EXIT_START_AGAIN, EXIT_BAD_INPUT, EXIT_STOPPED, 1)
_LEAST_TELLING = (EXIT_ANOTHER_FAILED, 128 + signal.SIGTERM, 128 + signal.SIGKILL)


def exit_code_of(codes: Iterable[int]) -> int:
    """The code that says most of why a run ended; negative ones, of processes that a signal ended, become 128 + signal."""
    seen = {128 - code if code < 0 else code for code in codes} - {0}
    for code in _MOST_TELLING:
        if code in seen:
            return code
    others = sorted(seen - set(_LEAST_TELLING))
    return others[0] if others else next((code for code in _LEAST_TELLING if code in seen), 0)
