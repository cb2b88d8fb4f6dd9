"""Lower layers never import upper ones, modules never import in a circle, and unusable packages are hidden from core in time.

Read from the sources, imports inside functions included: a layer that is only reached at run time is still a dependency.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import shutil
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "megatron_dppo"
# What each layer may import. A new sub-package has to be placed here.
LOSS_LAYERS = {"errors", "_C", "ops", "loss"}
MODEL_LAYERS = LOSS_LAYERS | {"compat", "distributed", "models"}
MAY_IMPORT = {
    "__init__": LOSS_LAYERS,  # the public names
    "errors": set(),
    "ops": {"errors", "_C"},
    "loss": {"errors", "_C", "ops"},
    "compat": {"errors"},
    "distributed": {"errors", "compat"},
    "models": MODEL_LAYERS - {"models"},
    "rollout": MODEL_LAYERS,
    "tasks": {"errors", "compat"},
    "training": MODEL_LAYERS | {"rollout", "tasks"},
    "serve": {"errors", "rollout", "training"},
    "train": {"errors", "training"},
    "convert": {"errors", "training"},
    "data": {"errors", "launch", "tasks", "training"},
    "launch": MODEL_LAYERS | {"rollout", "tasks", "training", "serve", "train"},
    "cli": {"errors"},  # commands are modules that it imports by name
    "__main__": {"cli"},
    "integrations": LOSS_LAYERS,
}
WITHOUT_MEGATRON = {"__init__", "errors", "ops", "loss", "integrations"}  # when imported


def findings(package: Path) -> list[str]:
    """Everything that breaks a rule, one line each."""
    trees = {_module(path, package): _parsed(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")}
    imports = {module: _imports(tree) for module, tree in trees.items()} | {"megatron_dppo._C": set()}  # compiled
    found = []
    for module, names in sorted(imports.items()):
        layer = _layer(module)
        for name in sorted(name for name in names if name.startswith("megatron_dppo")):
            if _layer(name) != layer and _layer(name) not in MAY_IMPORT.get(layer, set()):
                found.append(f"{module} imports {name}: {layer} must not know {_layer(name)}")
    circle = _circle({module: {_known(name, imports) for name in names} - {""} for module, names in imports.items()})
    found += [f"a circle: {' <- '.join(circle)}"] if circle else []
    for module, tree in sorted(trees.items()):
        if any(name.partition(".")[0] == "megatron" for name in _imports(tree, at_import=True)):
            layer = _layer(module)
            if layer in WITHOUT_MEGATRON:
                found.append(f"{module} imports Megatron when it is imported")
            elif not _hides_first(trees[f"megatron_dppo.{layer}"]):
                found.append(
                    f"{layer}/__init__.py does not call hide_unusable_dependencies() before Megatron is imported"
                )
    return found


@functools.cache  # a copy of the package differs in one file
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _module(path: Path, package: Path) -> str:
    return ".".join(["megatron_dppo", *path.relative_to(package).with_suffix("").parts]).removesuffix(".__init__")


def _layer(module: str) -> str:
    """The sub-package, or the module beside them; the package itself is ``__init__``."""
    return [*module.split("."), "__init__"][1]


@functools.cache
def _imports(tree: ast.Module, at_import: bool = False) -> set[str]:
    """Names that are imported, ``from a import b`` as ``a.b``; ``at_import``: without those inside functions."""
    names: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports are not read"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return names


def _known(name: str, modules: dict[str, set[str]]) -> str:
    """The module that an imported name is, or is in; "" if it is not of this package."""
    parent = name.rpartition(".")[0]
    return name if name in modules else parent if parent in modules else ""


def _circle(dependencies: dict[str, set[str]]) -> list[str]:
    # A package may import its own modules, and they need not import it back.
    try:
        graphlib.TopologicalSorter(dependencies).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _hides_first(tree: ast.Module) -> bool:
    """Whether a package hides unusable dependencies before it imports anything of this package but what it needs to."""
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and ast.unparse(statement) == "hide_unusable_dependencies()":
            return True
        for name in _imports(ast.Module([statement], [])):
            if name.startswith("megatron") and not name.startswith(("megatron_dppo.compat.", "megatron_dppo.errors.")):
                return False
    return False


def imports_of_test_modules(source: str) -> list[str]:
    """Test modules that a file of tests imports, or names in a script for another process."""
    tree = ast.parse(source)
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    scripts = [value for value in constants if isinstance(value, str) and "\n" in value]
    in_scripts = re.findall(r"^(?:from|import) (tests[\w.]*\.test_\w+)", "\n".join(scripts), re.MULTILINE)
    imported = [name for name in _imports(tree) if re.match(r"tests\.(\w+\.)*test_\w+", name)]
    return sorted(imported) + in_scripts


def test_test_modules_do_not_import_test_modules() -> None:
    """What several need is a module of its own: one test can then be changed, moved or deleted without the others."""
    found = {str(path): imports_of_test_modules(path.read_text(encoding="utf-8")) for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from tests.models.test_build import QWEN3",
        "import tests.models.test_build",
        "def f():\n    from tests.models import test_build",
        r"SCRIPT = 'import sys\nfrom tests.tasks.test_scoring import ORDERS\n'",
    ],
)
def test_an_import_of_a_test_module_is_found(line: str) -> None:
    assert len(imports_of_test_modules(line)) == 1
    assert imports_of_test_modules("from tests.models.tiny_policies import KINDS\nimport pytest") == []


def test_every_import_goes_downwards() -> None:
    assert {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} == set(
        MAY_IMPORT
    )
    assert findings(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "finding"),
    [
        ("errors.py", "import megatron_dppo.ops.backend", "errors must not know ops"),
        ("ops/backend.py", "from megatron_dppo.loss import config", "ops must not know loss"),
        ("ops/backend.py", "def f():\n    from megatron_dppo.compat import extras", "ops must not know compat"),
        (
            "loss/config.py",
            "from megatron_dppo.distributed.layout import ParallelConfig",
            "loss must not know distributed",
        ),
        ("compat/extras.py", "from megatron_dppo import distributed", "compat must not know distributed"),
        ("distributed/ranks.py", "import megatron_dppo", "distributed must not know __init__"),
        ("models/build.py", "from megatron_dppo.rollout.sample import Sample", "models must not know rollout"),
        ("rollout/sample.py", "from megatron_dppo.tasks.task import Problem", "rollout must not know tasks"),
        ("tasks/task.py", "from megatron_dppo.training.inputs import RunInputs", "tasks must not know training"),
        ("integrations/megatron_lm.py", "import megatron_dppo.models.build", "integrations must not know models"),
        ("integrations/megatron_lm.py", "from megatron.core import parallel_state", "imports Megatron when"),
        ("loss/config.py", "try:\n    import megatron.core\nexcept ImportError:\n    pass", "imports Megatron when"),
        ("compat/extras.py", "import megatron.core", "compat/__init__.py does not call hide_unusable_dependencies"),
        ("models/__init__.py", "", "models/__init__.py does not call hide_unusable_dependencies"),
        ("loss/config.py", "from megatron_dppo.loss.dppo_loss import DPPOLoss", "a circle: "),
        ("new_layer/__init__.py", "import megatron_dppo.errors", "new_layer must not know errors"),
        ("training/run.py", "import megatron_dppo.launch.config", "training must not know launch"),
    ],
)
def test_a_broken_rule_is_found(file: str, line: str, finding: str, tmp_path: Path) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / "megatron_dppo", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / file).parent.mkdir(exist_ok=True)
    before = (copy / file).read_text(encoding="utf-8") if (copy / file).exists() and line else ""
    (copy / file).write_text(f"{before}\n{line}\n", encoding="utf-8")
    assert any(finding in found for found in findings(copy)), findings(copy)
