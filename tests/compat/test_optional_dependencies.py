"""Absent, broken and present packages, each in a fresh interpreter with only fakes on its path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_PROBE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("optional_dependencies", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["optional_dependencies"] = module
spec.loader.exec_module(module)
availability = getattr(module, sys.argv[2])()
print(availability.usable)
print(availability.reason)
module.hide_unusable_dependencies()
for name in sys.argv[3:]:
    try:
        importlib.import_module(name)
        print("imports", name)
    except ImportError:
        print("ImportError", name)
assert getattr(module, sys.argv[2])().usable == availability.usable, "the answer changed by hiding"
"""
_SOURCE = Path(__file__).parents[2] / "megatron_dppo" / "compat" / "optional_dependencies.py"
_TRANSFORMER_ENGINE = "LayerNormLinear = Linear = DotProductAttention = RMSNorm = object\n"


def _probe(
    folder: Path, files: dict[str, str], function: str, *imports: str, gpu: bool = True, before: str = ""
) -> list[str]:
    torch = {"torch/__init__.py": "import torch.cuda\n", "torch/cuda.py": f"def is_available(): return {gpu}\n"}
    for name, text in {**torch, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # -S: no installed packages, only the standard library and the fakes.
    command = [sys.executable, "-S", "-c", before + _PROBE, str(_SOURCE), function, *imports]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_absent_transformer_engine(tmp_path: Path) -> None:
    usable, reason, imported = _probe(tmp_path, {}, "probe_transformer_engine", "transformer_engine")
    assert usable == "False"
    assert "not installed" in reason
    assert imported == "ImportError transformer_engine"


@pytest.mark.parametrize(
    "error", ["OSError('libcudart.so.13')", "FileNotFoundError('no library')", "RuntimeError('x')"]
)
def test_broken_transformer_engine_is_unusable_and_hidden_from_core(error: str, tmp_path: Path) -> None:
    files = {
        "transformer_engine/__init__.py": "",
        "transformer_engine/common/__init__.py": "",
        "transformer_engine/pytorch/__init__.py": f"import transformer_engine.common\nraise {error}\n",
    }
    names = ("transformer_engine", "transformer_engine.common", "transformer_engine.pytorch")
    usable, reason, *imported = _probe(tmp_path, files, "probe_transformer_engine", *names)
    assert usable == "False"
    assert error.split("(")[0] in reason
    assert imported == [f"ImportError {name}" for name in names]


def test_transformer_engine_without_the_layers_names_them(tmp_path: Path) -> None:
    files = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": "Linear = object\n"}
    usable, reason = _probe(tmp_path, files, "probe_transformer_engine")
    assert usable == "False"
    assert "LayerNormLinear" in reason


_PRESENT = {
    "transformer_engine/__init__.py": "__version__ = '2.9'\n",
    "transformer_engine/pytorch/__init__.py": _TRANSFORMER_ENGINE,
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "",
    "amp_C.py": "",
    "fused_weight_gradient_mlp_cuda.py": "wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp16 = object\n",
}


@pytest.mark.parametrize(
    ("package", "function"),
    [
        ("transformer_engine", "probe_transformer_engine"),
        ("apex", "probe_apex"),
        ("fused_weight_gradient_mlp_cuda", "probe_weight_gradient_fusion"),
    ],
)
def test_what_works_on_a_gpu_is_hidden_where_there_is_none_and_not_even_imported(
    package: str, function: str, tmp_path: Path
) -> None:
    files = {name: f"{text}print('{name} was imported')\n" for name, text in _PRESENT.items()}
    answer = _probe(tmp_path, files, function, package, gpu=False)
    reason = f"{package} is installed, but torch sees no GPU that it could run on"
    assert answer == ["False", reason, f"ImportError {package}"]


def test_present_transformer_engine(tmp_path: Path) -> None:
    answer = _probe(tmp_path, _PRESENT, "probe_transformer_engine", "transformer_engine.pytorch")
    assert answer == ["True", "transformer_engine 2.9", "imports transformer_engine.pytorch"]


def test_a_transformer_engine_without_cores_kernels_is_too_old(tmp_path: Path) -> None:
    files = {**_PRESENT, "transformer_engine/__init__.py": "__version__ = '2.0.1'\n"}
    usable, reason, imported = _probe(tmp_path, files, "probe_transformer_engine", "transformer_engine")
    assert usable == "False"
    assert reason == "transformer_engine 2.0.1 lacks kernels that 2.1 has: install a newer one"
    assert imported == "ImportError transformer_engine"


@pytest.mark.parametrize(
    ("source", "usable", "reason"),
    [
        ("class Buffer: pass\n", "True", "deep_ep"),
        ("", "False", "deep_ep lacks Buffer"),
        ("raise OSError('libnvshmem_host.so')\n", "False", "deep_ep is broken (OSError: libnvshmem_host.so)"),
    ],
)
def test_deep_ep_is_probed_and_hidden_from_core_where_it_is_broken(
    source: str, usable: str, reason: str, tmp_path: Path
) -> None:
    answer = _probe(tmp_path, {"deep_ep.py": source}, "probe_deep_ep", "deep_ep")
    assert answer == [usable, reason, ("imports " if usable == "True" else "ImportError ") + "deep_ep"]


def test_the_unrelated_package_called_apex_is_unusable_and_hidden_from_core(tmp_path: Path) -> None:
    usable, reason, imported = _probe(tmp_path, {"apex/__init__.py": ""}, "probe_apex", "apex")
    assert usable == "False"
    assert "not NVIDIA's" in reason
    assert imported == "ImportError apex"


def test_present_apex(tmp_path: Path) -> None:
    usable, _, imported = _probe(tmp_path, _PRESENT, "probe_apex", "apex")
    assert usable == "True"
    assert imported == "imports apex"


def test_absent_apex(tmp_path: Path) -> None:
    assert _probe(tmp_path, {}, "probe_apex")[1] == "apex is not installed"


_KERNEL = "fused_weight_gradient_mlp_cuda"


@pytest.mark.parametrize(
    ("source", "usable", "reason"),
    [
        ("wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp16 = object\n", "True", _KERNEL),
        ("wgrad_gemm_accum_fp32 = object\n", "False", "lacks wgrad_gemm_accum_fp16"),
        ("raise OSError('libcudart.so.13')\n", "False", "broken (OSError: libcudart.so.13)"),
    ],
)
def test_the_weight_gradient_kernel_is_probed_without_apex(
    source: str, usable: str, reason: str, tmp_path: Path
) -> None:
    answer = _probe(tmp_path, {f"{_KERNEL}.py": source}, "probe_weight_gradient_fusion", _KERNEL)
    assert answer[0] == usable
    assert reason in answer[1]
    assert answer[2] == ("imports " if usable == "True" else "ImportError ") + _KERNEL


def test_an_absent_weight_gradient_kernel(tmp_path: Path) -> None:
    assert "not installed" in _probe(tmp_path, {}, "probe_weight_gradient_fusion")[1]


def test_core_that_chose_before_is_reported(tmp_path: Path) -> None:
    files = {
        "transformer_engine/__init__.py": "class FusedAdam: pass\n",
        "megatron/core/optimizer.py": "from transformer_engine import FusedAdam as Adam\nmulti = Adam\n",
    }
    before = "import megatron.core.optimizer, warnings; warnings.simplefilter('error')\n"
    with pytest.raises(
        AssertionError, match=r"takes its optimizer from transformer_engine, which cannot be used .* first"
    ):
        _probe(tmp_path, files, "probe_transformer_engine", before=before, gpu=False)


_WHERE_CORE_GOT_ITS_OPTIMIZER = """
import megatron_dppo.training
from megatron.core.optimizer import Adam, clip_grads
print(Adam.__module__, clip_grads.l2_norm_impl.__module__)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_core_takes_no_optimizer_that_needs_a_gpu_where_there_is_none(tmp_path: Path) -> None:
    """Transformer Engine imports on such a machine, and its optimizer's first step is a CUDA error."""
    optimizers = "FusedAdam = FusedSGD = multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = object\n"
    files = {**_PRESENT, "transformer_engine/pytorch/optimizers.py": optimizers}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", _WHERE_CORE_GOT_ITS_OPTIMIZER],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{_SOURCE.parents[2]}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout.split() == ["torch.optim.adamw", "megatron.core.utils"], done.stderr
