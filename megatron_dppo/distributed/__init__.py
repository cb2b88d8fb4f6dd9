"""Layouts, ranks and groups, and the few collectives on Python values."""

from megatron_dppo.compat.optional_dependencies import hide_unusable_dependencies

hide_unusable_dependencies()  # before any import of megatron.core
