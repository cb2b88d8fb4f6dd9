"""What most ranks of the tests import. tests/rank_pool.py has it imported once, in a process that ranks are forked from.

Nothing here may start a thread: forks would not have it.
"""

from __future__ import annotations

import reasoning_gym  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import megatron_dppo.rollout.embedded.engine
import megatron_dppo.training.run  # noqa: F401
import tests.rank_pool  # noqa: F401
from megatron_dppo.ops.backend import backend_report

backend_report()  # the compiled kernels, where they are built: torch takes half a second to learn of their operators
