"""Megatron-core policy models: building, the output layer, routing replay; ``hf/`` reads and writes Hugging Face checkpoints.

Versions 0.16 to 0.19 of megatron-core are supported. What differs between them is handled in one place each:

* which model class it is (0.19 announces GPTModel's successor): build.py;
* MoE routing without Transformer Engine, which 0.16 fails at: compat/optional_dependencies.py;
* arguments that newer versions pass to attention and norm modules: ``**unused`` in attention.py and layer_spec.py;
* KV heads repeated over more TP ranks than there are, which only newer versions can: refused in hf/config.py.
"""

from megatron_dppo.compat.optional_dependencies import hide_unusable_dependencies

hide_unusable_dependencies()  # before any import of megatron.core
