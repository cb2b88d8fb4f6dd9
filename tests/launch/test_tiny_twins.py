"""Every recipe's `-tiny` twin trains three steps on CPU ranks."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megatron_dppo.launch.recipes import RECIPES, load_recipe
from tests.forked_ranks import run_script
from tests.training.tiny_runs import MISMATCH, QUICK_SCRIPT, SCRIPT
from tools.setup import make_tiny_policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
nightly = pytest.mark.nightly


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the policies of examples/conf/model/tiny_*.yaml, made as those files say."""
    folder = tmp_path_factory.mktemp("twins")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for path in (RECIPES.parent / "model").glob("tiny_*.yaml"):
            comment = " ".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
            command = comment[comment.index("tools/setup/make_tiny_policy.py") :]
            patch.setattr("sys.argv", shlex.split(command))
            make_tiny_policy.main()
    return folder


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param("dppo-qwen3-30b-a3b-base-4n8g-tp2ep8", 4, marks=nightly),
        pytest.param("dppo-qwen3-8b-1n8g-tp2-split", 2, marks=[nightly, pytest.mark.sglang]),
        pytest.param("dppo-qwen3-8b-1n8g-tp2-colocated", 2, marks=[nightly, pytest.mark.sglang]),
        pytest.param("dppo-qwen3-30b-a3b-8n8g-tp4ep8", 4, marks=nightly),
        pytest.param("dppo-qwen3-235b-a22b-64n8g-tp4pp4ep8", 8, marks=nightly),
        pytest.param("dppo-qwen3-4b-thinking-8n8g-tp2cp4-65k", 4, marks=nightly),
        pytest.param("dppo-r1-distill-qwen-1.5b-1n8g-dp8-sanity", 2),
    ],
)
def test_a_twin_trains(name: str, ranks: int, workplace: Path) -> None:
    recipe = load_recipe(f"{name}-tiny")
    assert recipe.launch.processes_per_node == ranks
    arguments = ["--config", str(RECIPES / f"{name}-tiny.yaml"), f"run.name={name}"]
    script = QUICK_SCRIPT if recipe.rollout.engine == "embedded" else SCRIPT
    code, output = run_script(script, arguments, ranks=ranks, folder=workplace, timeout=500)
    assert code == 0, output[-4000:]
    lines = (workplace / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = {record["step"]: record for record in map(json.loads, lines)}
    assert sorted(steps) == [0, 1, 2, 3]
    allowed = MISMATCH if recipe.rollout.engine == "embedded" else recipe.algorithm.max_mismatch
    assert max(steps[step]["mismatch/abs_log_ratio"] for step in (1, 2, 3)) < allowed
    assert all(0 <= steps[step]["grad_norm"] < 1e3 for step in (1, 2, 3))
