"""Rollouts: what a sample is, the engines that draw samples, and how weights reach them."""

from megatron_dppo.compat.optional_dependencies import hide_unusable_dependencies

hide_unusable_dependencies()  # before any import of megatron.core
