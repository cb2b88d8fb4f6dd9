"""The trainer: configuration, batching, optimizer steps, loop, checkpoints, metrics."""

from megatron_dppo.compat.optional_dependencies import hide_unusable_dependencies

hide_unusable_dependencies()  # before any import of megatron.core
