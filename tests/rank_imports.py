"""What most ranks of the tests import. tests/rank_pool.py has it imported once, in a process that ranks are forked from.

Nothing here may start a thread: forks would not have it.
"""

from __future__ import annotations

import transformers  # noqa: F401

import megatron_dppo.training.trainer  # noqa: F401
import tests.rank_pool  # noqa: F401
