"""What an installation needs: the loss torch alone, each sub-package its extras, and one clear error where one is absent."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from email import message_from_string
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_dppo"
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the source tree is not beside the tests")

# The extras that the modules of each sub-package may import from; the longest path that fits counts.
EXTRAS_OF = {
    "megatron_dppo": (),  # the public names, errors, loss, ops, integrations
    "megatron_dppo/compat": ("train",),
    "megatron_dppo/convert.py": ("train",),
    "megatron_dppo/distributed": ("train",),
    "megatron_dppo/launch": ("train",),
    "megatron_dppo/launch/nemo.py": ("train", "launch"),
    "megatron_dppo/models": ("train",),
    "megatron_dppo/rollout": ("train",),
    "megatron_dppo/rollout/sglang": ("train", "sglang"),
    "megatron_dppo/rollout/sglang/server_plugin": ("sglang-server",),  # loaded by the server
    "megatron_dppo/tasks": ("tasks", "data", "http-reward"),
    "megatron_dppo/training": ("train",),
    "megatron_dppo/training/metrics/wandb_sink.py": ("train", "wandb"),
    "examples": ("train",),
    "examples/stability_study": ("train", "plots"),
    "tests": ("dev",),
    "tests/loss": ("test",),
    "tests/ops": ("test",),
    "tools": ("dev",),
}
# Distributions called otherwise than their module, that are not installed everywhere.
ABSENT_AT_TIMES = {"bochscpu": "bochscpu-python"}
# Imported although no extra brings them.
NOT_OURS = {
    "setuptools",  # torch brings it
    "sgl_kernel",  # cpu_shim stands in for it in the server's process
    "liger_kernel",  # compared with where it is installed
    # tools/integrations records the calls of these beside their sources; what comes with them is theirs.
    "hydra",
    "miles",
    "nemo_rl",
    "open_instruct",
    "skyrl",
    "slime",
    "tensordict",
    "train_rl",
    "typing_extensions",
    "verl",
}


# --- metadata, from a wheel without the compiled extension


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the sources: a build leaves files beside setup.py."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "megatron_dppo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    environment = {**_environment(), "MEGATRON_DPPO_BUILD_EXT": "0"}
    command = [sys.executable, "-c", build]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next((folder / "dist").glob("*.whl")))


@pytest.fixture(scope="module")
def requirements(wheel: zipfile.ZipFile) -> dict[str, set[str]]:
    """Normalised names of the distributions that each extra brings; "" holds what is always installed."""
    name = next(name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
    metadata = message_from_string(wheel.read(name).decode())
    found: dict[str, set[str]] = {"": set(), **{extra: set() for extra in metadata.get_all("Provides-Extra", [])}}
    for requirement in metadata.get_all("Requires-Dist", []):
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", requirement)
        distribution = re.match(r"[\w.-]+", requirement)
        assert distribution is not None
        found[extra[1] if extra else ""].add(_normalised(distribution[0]))
    return found


def test_torch_is_the_only_requirement_without_an_extra(requirements: dict[str, set[str]]) -> None:
    assert requirements[""] == {"torch"}


def test_dev_includes_every_other_extra_that_runs_without_a_gpu(requirements: dict[str, set[str]]) -> None:
    # wandb brings sixteen packages for one test, which is skipped without it; NeMo-Run (launch) 531 MB for two executors.
    for extra in requirements.keys() - {"te", "sglang-server", "wandb", "launch"}:
        assert requirements[extra] <= requirements["dev"] | requirements[""], extra
    assert requirements["sglang"] < requirements["sglang-server"]


def test_the_wheel_holds_every_package_and_the_types(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    plugins = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.dist-info/*")}  # of servers
    assert plugins
    assert held >= modules | plugins | {"megatron_dppo/py.typed", "megatron_dppo/_C.pyi"}
    assert {name.split("/")[0] for name in held} == {
        "megatron_dppo",
        next(n.split("/")[0] for n in held if re.match(r"[^/]+\.dist-info/", n)),
    }


def test_the_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/entry_points\.txt", name))
    assert "megatron-dppo = megatron_dppo.cli:main" in wheel.read(name).decode().splitlines()


def test_third_party_imports_are_covered_by_the_extras(requirements: dict[str, set[str]]) -> None:
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for top in ("megatron_dppo", "examples", "tests", "tools")
        for path in sorted((ROOT / top).rglob("*.py"))
        for line, module in _third_party_imports(path.read_text(encoding="utf-8"))
        if not _distributions(module) & _allowed(path, requirements)
    ]
    assert missing == []


def test_an_import_that_no_extra_covers_would_be_found(requirements: dict[str, set[str]]) -> None:
    source = "import os\ndef f():\n    import rich.console\n    from torch.utils.tensorboard import SummaryWriter\n"
    imports = _third_party_imports(source)
    assert imports == [(3, "rich"), (4, "tensorboard")]
    for _, module in imports:
        assert not _distributions(module) & _allowed(PACKAGE / "loss" / "new.py", requirements)
        assert _distributions(module) & _allowed(PACKAGE / "training" / "new.py", requirements)


def _allowed(path: Path, requirements: dict[str, set[str]]) -> set[str]:
    place = path.relative_to(ROOT)
    extras = next(EXTRAS_OF[parent.as_posix()] for parent in (place, *place.parents) if parent.as_posix() in EXTRAS_OF)
    return requirements[""].union(*(requirements[extra] for extra in extras))


def _third_party_imports(source: str) -> list[tuple[int, str]]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            # torch's own module of that name imports a package that torch does not require.
            module = "tensorboard" if name.startswith("torch.utils.tensorboard") else name.partition(".")[0]
            if module not in sys.stdlib_module_names | NOT_OURS | _our_modules():
                found.add((node.lineno, module))
    return sorted(found)


@functools.cache
def _our_modules() -> frozenset[str]:
    """What a test or tool can import from this tree: its folders, and modules of a folder that it puts on sys.path."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    return frozenset(
        folders.union(*({path.stem for path in ROOT.glob(f"{name}/*.py")} for name in ("csrc", "tests/csrc")))
    )


@functools.cache
def _installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def _distributions(module: str) -> set[str]:
    """What brings a module: installed distributions may be called otherwise (yaml comes with PyYAML)."""
    return {_normalised(name) for name in _installed().get(module, [ABSENT_AT_TIMES.get(module, module)])}


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- imports, each in a fresh interpreter: a fork of one that has imported torch, which takes longest, and nothing else

_FORKS = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, log = json.loads(line)
    if (child := os.fork()) == 0:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)
        try:
            exec(code, {"__name__": "__main__"})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Fresh = Callable[[str], tuple[int, str]]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """``fresh(code)`` -> exit code (1 for an exception) and standard error of the code in an interpreter of its own."""
    log = tmp_path_factory.mktemp("fresh") / "stderr"
    command = [sys.executable, "-W", "ignore", "-c", _FORKS]
    with subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to_it, from_it = process.stdin, process.stdout

        def run(code: str) -> tuple[int, str]:
            print(json.dumps([code, str(log)]), file=to_it, flush=True)
            return int(from_it.readline()), log.read_text(encoding="utf-8")

        yield run


_ONLY_TORCH = """
import importlib.abc, sys
import torch
brought_by_torch = {name.partition(".")[0] for name in sys.modules}

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        top = fullname.partition(".")[0]
        if top != "megatron_dppo" and top not in sys.stdlib_module_names and top not in brought_by_torch - {"numpy"}:
            raise ModuleNotFoundError(f"blocked: {fullname}", name=fullname)

for name in [name for name in sys.modules if name.partition(".")[0] == "numpy"]:
    del sys.modules[name]
marker = object()
sys.modules["transformer_engine"] = sys.modules["apex"] = marker
sys.meta_path.insert(0, Blocked())
"""
_LOSS = """
import megatron_dppo
for name in megatron_dppo.__all__:
    assert getattr(megatron_dppo, name) is not None
import megatron_dppo.integrations.megatron_lm
from megatron_dppo.ops import backend
for name in ("loss", "ops", "integrations"):
    for module in pkgutil.iter_modules(importlib.import_module(f"megatron_dppo.{name}").__path__):
        if module.name not in ("__main__", "native_backend"):
            importlib.import_module(f"megatron_dppo.{name}.{module.name}")
assert sys.modules["transformer_engine"] is marker and sys.modules["apex"] is marker
assert not {"megatron", "transformers", "omegaconf", "numpy"} & {name.partition(".")[0] for name in sys.modules}
assert "fused_weight_gradient_mlp_cuda" not in sys.modules
"""


def test_the_loss_needs_torch_alone_and_leaves_other_packages_as_they_are(fresh: Fresh) -> None:
    code, said = fresh(f"import pkgutil, importlib\n{_ONLY_TORCH}{_LOSS}")
    assert code == 0, said


_ADAPTERS = """
from types import ModuleType, SimpleNamespace
from megatron_dppo import DPPOConfig
from megatron_dppo.integrations import framework

def install(name, **attributes):
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(attributes)

config = DPPOConfig()
kinds = SimpleNamespace(LOGPROB=1, TOKENS=1, SEQUENCES=2, NONE=3)
install("verl", __version__="0.10.0.dev")
install("verl.trainer.ppo.core_algos", register_policy_loss=lambda name: lambda function: function)
install("nemo_rl", __version__="0.6.0")
install("nemo_rl.algorithms.loss.interfaces", LossInputType=kinds, MetricNormalizer=kinds, LossType={"TOKEN_LEVEL": 1})
install("skyrl", __version__="0.3.0")
install("skyrl.backends.skyrl_train.utils.ppo_utils", PolicyLossRegistry=SimpleNamespace(register=lambda name, loss: None))
install("megatron.core.package_info", __version__="0.20.0")
framework.version = {"slime": "0.3.1", "miles": "0.1.0"}.__getitem__
from megatron_dppo.integrations import megatron_lm, megatron_rl, miles, nemo_rl, skyrl, slime, verl
made = [
    verl.register("dppo", config), skyrl.register("dppo", config), slime.make_loss_function(config),
    miles.make_loss_function(config), megatron_rl.make_grpo_loss(config), nemo_rl.DPPOLossFn(config),
]
assert all(callable(loss) for loss in made)
"""


def test_an_adapter_needs_its_framework_and_torch_alone(fresh: Fresh) -> None:
    """The frameworks are stand-ins; whatever else an adapter asked for would be missing."""
    code, said = fresh(f"{_ONLY_TORCH}{_ADAPTERS}")
    assert code == 0, said


def test_a_process_that_grades_imports_no_torch() -> None:
    code = (
        "import sys, megatron_dppo, megatron_dppo.tasks.scoring_worker\n"
        "print(hasattr(megatron_dppo, 'no_such_name'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "statement",
    [
        "import megatron.core",
        "import numpy",
        "import omegaconf",
        "sys.modules['apex'] = None",
        "import megatron_dppo.models",
    ],
)
def test_the_check_of_the_loss_sees_what_it_must_not_do(fresh: Fresh, statement: str) -> None:
    code, said = fresh(f"import pkgutil, importlib\n{_ONLY_TORCH}{statement}\n{_LOSS}")
    assert code == 1
    assert re.search("blocked: |AssertionError", said.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        ("reasoning_gym", "megatron_dppo.tasks.reasoning_gym_task", "tasks"),
        ("math_verify", "megatron_dppo.tasks.math_task", "tasks"),
        ("pyarrow", "megatron_dppo.tasks.rows.arrow_rows", "data"),
        ("aiohttp", "megatron_dppo.tasks.http_reward", "http-reward"),
        ("aiohttp", "megatron_dppo.rollout.sglang.engine", "sglang"),
        ("tenacity", "megatron_dppo.rollout.sglang.engine", "sglang"),
        ("tensorboard", "megatron_dppo.training.metrics.tensorboard_sink", "train"),
        ("megatron", "megatron_dppo.distributed.layout", "train"),
    ],
)
def test_an_absent_package_is_one_error_that_names_the_extra(
    fresh: Fresh, package: str, module: str, extra: str
) -> None:
    code, said = fresh(f"import sys; sys.modules[{package!r}] = None; import {module}")
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert package in last
    assert f"pip install 'megatron-dppo[{extra}]'" in last


def test_drawing_without_matplotlib_names_the_extra(fresh: Fresh, tmp_path: Path) -> None:
    statement = f"from tools.plot_run import plot; plot([], pathlib.Path({str(tmp_path)!r}))"
    code, said = fresh(f"import pathlib, sys; sys.modules['matplotlib'] = None; {statement}")
    assert code == 1
    assert "pip install 'megatron-dppo[plots]'" in said


@pytest.mark.slow
def test_a_run_with_sglang_is_refused_early_without_its_client(fresh: Fresh) -> None:
    from megatron_dppo.training.config.check import _check_extras
    from megatron_dppo.training.config.schema import Config, RolloutConfig

    _check_extras(Config(rollout=RolloutConfig(engine="sglang")))
    build = "check._check_extras(schema.Config(rollout=schema.RolloutConfig(engine={engine!r})))"
    block = "import sys; sys.modules['aiohttp'] = None\nfrom megatron_dppo.training.config import check, schema\n"
    assert fresh(block + build.format(engine="embedded"))[0] == 0
    _, said = fresh(block + build.format(engine="sglang"))
    assert "ConfigError: rollout.engine=sglang: aiohttp is not installed" in said
    assert "megatron-dppo[sglang]" in said


@pytest.mark.slow
def test_the_trainer_needs_the_packages_of_other_extras_only_where_they_are_used(
    fresh: Fresh, requirements: dict[str, set[str]]
) -> None:
    others = {"aiohttp", "tenacity", "reasoning_gym", "math_verify", "matplotlib", "gguf", "accelerate", "sglang"}
    assert not {_normalised(name) for name in others} & requirements["train"]
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(others)!r}))"
    code, said = fresh(f"{block}; import megatron_dppo.training.run, megatron_dppo.training.config.load")
    assert code == 0, said


# --- one set of versions


def test_pre_commit_and_constraints_name_the_same_versions() -> None:
    tested = (ROOT / "tools" / "setup" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    hooks = re.findall(r"[\w-]+==[\w.]+", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert len(hooks) >= 2
    assert set(hooks) <= set(tested)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
