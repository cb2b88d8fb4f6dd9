"""Is Transformer Engine, is Apex really usable? An import that fails in any way means no, with the reason.

megatron-core asks ``try: import transformer_engine except ImportError``. Two installations that are common defeat it: a
Transformer Engine without its CUDA libraries raises OSError or FileNotFoundError, and the ``apex`` that pip
installs by that name imports without error but is an unrelated toolkit. A third is no fault of the installation: where
there is no GPU these packages import, core takes its optimizer from them, and the first optimizer step ends in a CUDA
error. So a GPU is asked for here, then the exact symbols, and ``hide_unusable_dependencies`` makes core see an unusable
package as absent.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from dataclasses import dataclass

# What megatron-core's layers and fused kernels take from each package.
_TRANSFORMER_ENGINE_SYMBOLS = ("LayerNormLinear", "Linear", "DotProductAttention", "RMSNorm")
_OLDEST_TRANSFORMER_ENGINE = (2, 1)  # the first with the permutation kernels that core takes for MoE layers
_APEX_MODULES = ("apex.normalization.fused_layer_norm", "amp_C")
# Built with NVIDIA's Apex, but a top-level module of its own; core's linear layers call it for
# gradient_accumulation_fusion, and refuse that setting without it, Transformer Engine or not.
_WEIGHT_GRADIENT_MODULE = "fused_weight_gradient_mlp_cuda"
_WEIGHT_GRADIENT_SYMBOLS = ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16")

_DEEP_EP = "deep_ep"


@dataclass(frozen=True)
class Availability:
    """Whether a package can be used; ``reason`` says why not, or which version was found."""

    usable: bool
    reason: str


@functools.cache
def probe_transformer_engine() -> Availability:
    """Import the Transformer Engine layers that the policy's layer spec is made of. The first answer is kept."""
    if reason := _why_not("transformer_engine"):
        return Availability(False, reason)
    try:
        module = importlib.import_module("transformer_engine.pytorch")
        missing = [symbol for symbol in _TRANSFORMER_ENGINE_SYMBOLS if not hasattr(module, symbol)]
    except Exception as error:
        return Availability(False, f"transformer_engine is installed but broken ({type(error).__name__}: {error})")
    if missing:
        return Availability(False, f"transformer_engine.pytorch lacks {', '.join(missing)}")
    version = str(getattr(sys.modules["transformer_engine"], "__version__", "unknown"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _OLDEST_TRANSFORMER_ENGINE:
        oldest = ".".join(map(str, _OLDEST_TRANSFORMER_ENGINE))
        return Availability(False, f"transformer_engine {version} lacks kernels that {oldest} has: install a newer one")
    return Availability(True, f"transformer_engine {version}")


@functools.cache
def probe_apex() -> Availability:
    """Import the compiled Apex modules that core's fused norms and optimizers need. The first answer is kept."""
    if reason := _why_not("apex"):
        return Availability(False, reason)
    for name in _APEX_MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:
            return Availability(
                False, f"the installed apex is not NVIDIA's, or lacks {name} ({type(error).__name__}: {error})"
            )
    return Availability(True, "apex with its compiled extensions")


@functools.cache
def probe_weight_gradient_fusion() -> Availability:
    """Import the kernel that adds a weight's gradient to its fp32 ``main_grad`` within the matrix product."""
    if reason := _why_not(_WEIGHT_GRADIENT_MODULE):
        return Availability(False, reason)
    try:
        module = importlib.import_module(_WEIGHT_GRADIENT_MODULE)
    except Exception as error:
        return Availability(False, f"{_WEIGHT_GRADIENT_MODULE} is broken ({type(error).__name__}: {error})")
    missing = [symbol for symbol in _WEIGHT_GRADIENT_SYMBOLS if not hasattr(module, symbol)]
    if missing:
        return Availability(False, f"{_WEIGHT_GRADIENT_MODULE} lacks {', '.join(missing)}")
    return Availability(True, _WEIGHT_GRADIENT_MODULE)


@functools.cache
def probe_deep_ep() -> Availability:
    """Import the kernels that send tokens to experts for ``moe_token_dispatcher=flex``. The first answer is kept."""
    if reason := _why_not(_DEEP_EP):
        return Availability(False, reason)
    try:
        module = importlib.import_module(_DEEP_EP)
    except Exception as error:
        return Availability(False, f"{_DEEP_EP} is broken ({type(error).__name__}: {error})")
    return (
        Availability(True, _DEEP_EP) if hasattr(module, "Buffer") else Availability(False, f"{_DEEP_EP} lacks Buffer")
    )


def hide_unusable_dependencies() -> None:
    """Make importing Transformer Engine, Apex, its weight-gradient kernel or DeepEP raise ImportError where it is unusable.

    Has to run before the first import of megatron.core, which decides at import time what it builds on. Whatever the
    failed import left in ``sys.modules`` is hidden too, or core would find half a package there.
    """
    for package, availability in (
        ("transformer_engine", probe_transformer_engine()),
        ("apex", probe_apex()),
        (_WEIGHT_GRADIENT_MODULE, probe_weight_gradient_fusion()),
        (_DEEP_EP, probe_deep_ep()),
    ):
        if availability.usable:
            continue
        if _optimizer_is_from(package):
            warnings.warn(
                f"megatron.core was imported before megatron_dppo.training and takes its optimizer from {package}, which "
                f"cannot be used ({availability.reason}): import megatron_dppo.training first",
                RuntimeWarning,
                stacklevel=2,
            )
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            sys.modules[name] = None  # type: ignore[assignment]
        # The documented meaning of None: importing the name raises ModuleNotFoundError.
        sys.modules[package] = None  # type: ignore[assignment]


def define_names_core_lacks_without_transformer_engine() -> None:
    """Let core 0.16 route MoE tokens without Transformer Engine, on any device (0.19 does by itself).

    transformer/moe/moe_utils.py imports ``te_general_gemm`` in a ``try`` that leaves it undefined, and then asks whether it
    is None. Called when a model is built, as importing that module earlier would cost every import of this package.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _optimizer_is_from(package: str) -> bool:
    """Whether core has been imported, and has chosen."""
    optimizer = getattr(sys.modules.get("megatron.core.optimizer"), "Adam", None)
    return getattr(optimizer, "__module__", "").partition(".")[0] == package


def _why_not(package: str) -> str | None:
    """Why a package need not be imported to see that it is unusable: it is not there, was hidden, or has no GPU to run on."""
    absent = sys.modules[package] is None if package in sys.modules else importlib.util.find_spec(package) is None
    if absent:
        return f"{package} is not installed"
    import torch  # after the question that can be answered without

    if not torch.cuda.is_available():
        return f"{package} is installed, but torch sees no GPU that it could run on"
    return None
