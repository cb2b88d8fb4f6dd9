"""Megatron-core policy models: configuration from Hugging Face, building, weights in and out, running on a CPU."""

from megatron_dppo.models.optional_dependencies import hide_unusable_dependencies

# Before any module of this package imports megatron.core.
hide_unusable_dependencies()
