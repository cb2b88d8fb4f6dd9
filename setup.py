"""Package build of megatron_dppo.

The loss needs torch alone: ``pip install megatron-dppo``. Everything else is an extra:

    train           what the trainer and its models need: Megatron-core, Hugging Face, configuration, metrics
    tasks           reasoning-gym problems, and math-verify to grade JSONL files
    data            parquet files and saved Hugging Face datasets
    http-reward     rewards that a service gives
    sglang          the client of SGLang servers that run elsewhere: another host, container or virtual environment
    sglang-server   the server too, in the trainer's own environment (GPU hosts; tools/setup/install_sglang_cpu.sh for CPUs)
    te              Transformer Engine (GPU hosts; NVIDIA's apex is used too, but only its source can be installed)
    launch          handing jobs to Slurm by NeMo-Run (launch.slurm.submit=nemo_run); all other launching needs no extra
    gguf            reading GGUF weights (tools/setup/prepare_smollm2.py)
    wandb           Weights & Biases as a sink of metrics (logging.wandb)
    plots           tools/plot_run.py, the charts of tools/bench and of the stability study
    docs            the documentation as a site (tools/build_docs.sh)
    gpu-check       tools/gpu_check.sh in an interpreter that has torch already (docs/gpu.md)
    test            tests of the loss and its operators (tests/loss, tests/ops)
    dev             everything that the tests, the linters and the tools need

Ranges are given here; ``tools/setup/constraints.txt`` pins the one set of versions that the tests run with:

    pip install -c tools/setup/constraints.txt -e '.[dev]'

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

OMEGACONF = "omegaconf>=2.3"  # training/config and tasks/config.py are written with it

EXTRAS = {
    "train": [
        "megatron-core>=0.16,<0.20",
        "numpy>=1.26",  # checksums of weights
        "transformers>=5.0,<6",
        "tokenizers>=0.22",
        "jinja2>=3.1",  # chat templates
        "safetensors>=0.5",
        OMEGACONF,
        "pyyaml>=6.0",
        "rich>=13",
        "tensorboard>=2.15",  # logging.tensorboard is on unless switched off
        "psutil>=5.9",  # without it a checkpoint save of core never returns
    ],
    "tasks": [OMEGACONF, "reasoning-gym>=0.1.25", "math-verify>=0.9"],
    "data": ["pyarrow>=15"],
    "http-reward": ["aiohttp>=3.9", "tenacity>=8.2"],
    "sglang": ["aiohttp>=3.9", "tenacity>=8.2"],
    "te": ["transformer-engine[pytorch]>=2.0"],
    "launch": ["nemo-run==0.11.1", "leptonai==0.27.3"],  # a newer leptonai lacks what this nemo-run imports
    "gguf": ["gguf>=0.17", "accelerate>=1.0"],
    "plots": ["matplotlib>=3.8"],
    "docs": ["sphinx>=8.1", "furo>=2024.8", "myst-parser>=4"],
    "wandb": ["wandb>=0.31"],  # not in dev: it brings sixteen more; its test is skipped where it is absent
    "test": ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", OMEGACONF],
}
EXTRAS["sglang-server"] = [*EXTRAS["sglang"], "sglang>=0.5.20"]
# Without tensorboard, whose sink is off there, and reasoning-gym: less to carry to a machine without a registry.
EXTRAS["gpu-check"] = [
    *(requirement for requirement in EXTRAS["train"] if not requirement.startswith("tensorboard")),
    *EXTRAS["test"],
    "ninja>=1.11",  # compiles the extension's sources side by side
    "setuptools>=68",  # builds it; Python 3.12 has none of its own
]
EXTRAS["dev"] = sorted(
    {
        *(
            requirement
            for name in ("train", "tasks", "data", "sglang", "gguf", "plots", "docs", "test", "gpu-check")
            for requirement in EXTRAS[name]
        ),
        "coverage>=7.10",
        "mutmut==3.8.1",  # tools/check/mutation_score.py reads the files that it leaves
        "ruff>=0.6",
        "mypy>=1.11",
        "clang-format>=18",
        # Emulates AVX-512 for tests/csrc/test_cpu_levels.py; 0.4.0 asks for the C library of 2023 (glibc 2.38).
        "bochscpu-python==0.3.1; sys_platform == 'linux' and platform_machine == 'x86_64'",
    }
)


def native_extension() -> dict[str, Any]:
    """What setup() needs to build megatron_dppo._C, or nothing where it cannot or shall not be built."""
    modules = extension_modules()
    return {"ext_modules": modules, "cmdclass": {"build_ext": build_ext_command()}} if modules else {}


setup(
    name="megatron-dppo",
    version="0.2.0",
    description="Divergence Proximal Policy Optimization (DPPO) for Megatron-core policies, with SGLang rollouts",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["megatron_dppo", "megatron_dppo.*"]),
    package_data={
        "megatron_dppo": ["py.typed", "*.pyi"],
        "megatron_dppo.launch.report": ["assets/*"],
        "megatron_dppo.rollout.sglang.server_plugin": ["*.dist-info/*"],
    },
    entry_points={"console_scripts": ["megatron-dppo = megatron_dppo.cli:main"]},
    **native_extension(),
    # The one place that says so. csrc/build_extension.py says what is different before 2.11.
    install_requires=["torch>=2.6"],
    extras_require=EXTRAS,
)
