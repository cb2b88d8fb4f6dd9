"""Package build of megatron_dppo.

Ranges are given here; ``tools/setup/constraints.txt`` pins the one set of versions that the tests run with:

    pip install -c tools/setup/constraints.txt -e '.[dev]'

Extras: ``sglang`` (rollout server in the same environment, GPU hosts), ``te`` (Transformer Engine and apex, GPU hosts),
``gguf`` (tools/setup/prepare_smollm2.py), ``dev`` (tests, linters, plots).

The native kernels (csrc/) are built against the installed torch, so build without isolation:
``pip install --no-build-isolation .``. csrc/build_extension.py documents the environment variables; without a compiler or
torch the package installs all the same and computes in plain torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "csrc"))

from build_extension import build_ext_command, extension_modules  # noqa: E402


def native_extension() -> dict[str, Any]:
    """What setup() needs to build megatron_dppo._C, or nothing where it cannot or shall not be built."""
    modules = extension_modules()
    return {"ext_modules": modules, "cmdclass": {"build_ext": build_ext_command()}} if modules else {}


setup(
    name="megatron-dppo",
    version="0.1.0",
    description="Divergence Proximal Policy Optimization (DPPO) for Megatron-core policies, with SGLang rollouts",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["megatron_dppo", "megatron_dppo.*"]),
    package_data={"megatron_dppo": ["*.pyi"]},
    **native_extension(),
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "megatron-core>=0.16,<0.20",
        "transformers>=5.0,<6",
        "tokenizers>=0.22",
        "jinja2>=3.1",
        "safetensors>=0.5",
        "omegaconf>=2.3",
        "rich>=13",
        "aiohttp>=3.9",
        "tenacity>=8.2",
        "tensorboard>=2.15",
        "reasoning-gym>=0.1.25",
        "math-verify>=0.9",
        "matplotlib>=3.8",
    ],
    extras_require={
        "sglang": ["sglang>=0.5.20"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        "gguf": ["gguf>=0.17", "accelerate>=1.0"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "psutil>=5.9",
            "hypothesis>=6.100",
            "scipy>=1.11",
            "ruff>=0.6",
            "mypy>=1.11",
            "clang-format>=18",
            "ninja>=1.11",
            "pybind11>=2.12",
        ],
    },
)
