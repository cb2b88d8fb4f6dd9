"""A pytest plugin for mutation runs: ranks of the tests are forked from the process that asks them.

A rank must execute the mutant that its test is about, and say which functions it entered. Ranks of tests/rank_pool.py come
from a server that knows neither; forked here, they know both, and have everything imported.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable
from typing import Any

from mutmut.state import state

import tests.rank_imports  # noqa: F401  once, and not in every rank
from tests import rank_pool

_run = rank_pool.RankPool.run


def _with_entered_functions(function: Callable[..., Any], *args: Any) -> tuple[Any, set[str]]:
    return function(*args), set(state()._stats)


def _run_recorded(pool: rank_pool.RankPool, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    answers = _run(pool, _with_entered_functions, function, *args, **options)
    for _, entered in answers:
        state()._stats.update(entered)
    return [answer for answer, _ in answers]


rank_pool.forkserver = lambda: mp.get_context("fork")
rank_pool.RankPool.run = _run_recorded  # type: ignore[method-assign]
