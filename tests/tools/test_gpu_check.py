"""tools/gpu_check.sh: what it says without a GPU, and that no row, section or wheel takes the others with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_dppo.ops.backend import backend_report
from tests.waiting import wait_until
from tools.check.gpu_check import supervise, wheels
from tools.check.gpu_check.findings import Check, Finding, Options, Skipped
from tools.check.gpu_check.sections import SECTIONS, calls, counters, sanitizers
from tools.check.gpu_check.sections.training import judge
from tools.check.gpu_check.spelling_task import SpellingTask
from tools.check.gpu_check.table import Row, Table, markdown
from tools.check.gpu_check.worker import rows_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
with_kernels = pytest.mark.skipif(backend_report()["cpu"] != "available", reason=backend_report()["cpu"])


def gpu_check(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command with this interpreter."""
    given = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run([SCRIPT, *arguments], env=given, capture_output=True, text=True, timeout=timeout)


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().split("\n") if line]


# --- without a GPU


@no_gpu
def test_without_a_gpu_nothing_is_checked_and_nothing_is_installed(tmp_path: Path) -> None:
    result = subprocess.run([SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 3
    assert "no GPU: gpu_check needs an NVIDIA GPU with its driver, and nvcc" in result.stderr


@pytest.mark.slow
@no_gpu
def test_torch_without_cuda_is_no_gpu_either(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.check.gpu_check", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 3
    assert "sees no CUDA device" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "kernel"], "no section 'kernel': there are machine, calls"),
        (["--sanitizers", "x"], "no sanitizer 'x'"),
    ],
)
def test_a_name_that_is_unknown_is_an_error_that_lists_the_known_ones(arguments: list[str], said: str) -> None:
    result = gpu_check("--device", "cpu", *arguments)
    assert result.returncode == 2
    assert said in result.stderr


# --- the whole command on a CPU


@pytest.mark.slow
@with_kernels
def test_rows_of_a_section_end_up_in_a_file_and_in_a_table(tmp_path: Path) -> None:
    result = gpu_check("--device", "cpu", "--only", "machine,kernels", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = rows_in(tmp_path)
    checks = {row["check"]: row["outcome"] for row in rows}
    assert checks["extension"] == checks["wheels"] == checks["backend"] == "passed"
    assert checks["forward 64x4000 bf16"] == checks["one pass 64x4000 bf16"] == "measured"
    assert rows[-1]["values"]["bytes_per_s"] > 0
    table = (tmp_path / "table.md").read_text()
    assert table in result.stdout
    assert table.count("\n") == len(rows) + 2


@pytest.mark.slow
@with_kernels
def test_a_row_that_exceeds_its_limit_fails_and_the_next_section_goes_on(tmp_path: Path) -> None:
    only = ("--only", "unit_tests,counters", "--row-limit", "1.5")  # pytest takes longer to import torch
    result = gpu_check("--device", "cpu", *only, "--output", str(tmp_path))
    assert result.returncode == 1
    *_, first, second, next_one = rows_in(tmp_path)
    late = [first, second]
    assert [row["outcome"] for row in late] == ["failed", "failed"]
    assert (next_one["section"], next_one["outcome"]) == ("counters", "skipped")
    assert {row["figures"] for row in late} == {"not done within its limit of 1.5 s"}


@pytest.mark.slow
@with_kernels
def test_what_has_no_time_left_is_not_run_and_the_exit_code_tells(tmp_path: Path) -> None:
    result = gpu_check("--device", "cpu", "--seconds", "0", "--output", str(tmp_path))
    assert result.returncode == 1
    rows = [row for row in rows_in(tmp_path) if row["section"] != "preparation"]
    assert [(row["section"], row["outcome"]) for row in rows] == [(name, "not run") for name in SECTIONS]


# --- a section's process


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A section ``trial`` that a test writes: a module of its own beside the package's."""
    folder = tmp_path / "tools" / "check" / "gpu_check" / "sections"
    folder.parent.mkdir(parents=True)
    folder.mkdir()
    for path in (ROOT / "tools/check/gpu_check").glob("*.py"):
        (folder.parent / path.name).write_text(path.read_text())
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(supervise, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    return folder / "trial.py"


TRIAL = """
import os, signal, subprocess, sys, time
from tools.check.gpu_check.findings import Check, Finding, Skipped

def fine():
    return Finding("fine", True)

def hangs():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(600)

def dies():
    os.kill(os.getpid(), signal.SIGKILL)

def raises():
    raise ValueError("a value")

def skips():
    raise Skipped("no GPU here")

def checks(options):
    limits = {"hangs": 1.0}
    return [Check(f.__name__, f, limits.get(f.__name__, 60.0)) for f in (fine, hangs, raises, dies, skips)]
"""


def run_trial(section: Path, tmp_path: Path, source: str, deadline: float = float("inf")) -> list[Row]:
    section.write_text(source)
    options = Options("cpu", quick=False, sanitizers=(), scratch=tmp_path)
    return list(supervise.run_section("trial", options, deadline, tmp_path / "log.txt", None))


def test_whatever_a_check_does_the_next_one_is_made(section: Path, tmp_path: Path) -> None:
    rows = {row.check: row for row in run_trial(section, tmp_path, TRIAL)}
    assert {name: row.outcome for name, row in rows.items()} == {
        "fine": "passed",
        "hangs": "failed",
        "raises": "failed",
        "dies": "failed",
        "skips": "skipped",
    }
    assert rows["hangs"].figures == "not done within its limit of 1 s"
    assert rows["raises"].figures == "ValueError: a value"
    assert rows["dies"].figures.startswith("its process ended with SIGKILL")
    assert rows["skips"].figures == "no GPU here"


def test_nothing_that_a_check_started_outlives_it(section: Path, tmp_path: Path) -> None:
    # The process that the check starts is named by the section's options, which name this folder.
    source = TRIAL.replace('time.sleep(600)"])', 'time.sleep(600)", sys.argv[4]])')
    assert source != TRIAL
    run_trial(section, tmp_path, source.replace("(fine, hangs, raises, dies, skips)", "(hangs,)"))
    assert processes_that_name(str(tmp_path).encode()) == []


@pytest.mark.slow
@with_kernels
def test_a_command_that_is_ended_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.check.gpu_check", "--device", "cpu", "--only", "unit_tests"]
    mine = str(tmp_path).encode()
    scratch = {**os.environ, "TMPDIR": str(tmp_path)}  # is named in the worker's arguments
    with subprocess.Popen([*command, "--output", str(tmp_path)], cwd=ROOT, env=scratch) as process:
        wait_until(lambda: len(processes_that_name(mine)) > 1, within_s=120, what="the section's process")
        process.terminate()
        assert process.wait(60) == 128 + 15
    assert processes_that_name(mine) == []


def processes_that_name(what: bytes) -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if what in read_if_there(path)]


def read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no such library')", "RuntimeError: no such library"),
        ("def checks(o): return 1/0", "division"),
    ],
)
def test_a_section_that_cannot_be_imported_is_one_failed_row(
    section: Path, tmp_path: Path, source: str, said: str
) -> None:
    (row,) = run_trial(section, tmp_path, source)
    assert (row.check, row.outcome) == ("trial", "failed")
    assert said in row.figures


def test_a_check_is_ended_when_the_time_of_the_whole_is_over(section: Path, tmp_path: Path) -> None:
    source = TRIAL.replace('{"hangs": 1.0}', "{}").replace("(fine, hangs, raises, dies, skips)", "(hangs, fine)")
    rows = run_trial(section, tmp_path, source, deadline=time.monotonic() + 3.0)
    assert [row.outcome for row in rows] == ["not run"]


def test_a_check_gives_one_row_or_several() -> None:
    several = Check("times", lambda: [Finding("1 s", None, {"seconds": 1.0}, name="a"), Finding("2 s", False)], 1.0)
    assert rows_of(several) == [
        {"check": "a", "outcome": "measured", "figures": "1 s", "values": {"seconds": 1.0}},
        {"check": "times", "outcome": "failed", "figures": "2 s", "values": {}},
    ]

    def skip() -> Finding:
        raise Skipped("why")

    assert rows_of(Check("x", skip, 1.0)) == [{"check": "x", "outcome": "skipped", "figures": "why"}]


def test_rows_are_in_the_file_before_the_end(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.add(Row("kernels", "forward", "measured", "1 ms | 2 GB/s", {"seconds": 1e-3}))
    assert [row["check"] for row in rows_in(tmp_path)] == ["forward"]
    assert "| kernels | forward | measured | 1 ms \\| 2 GB/s | 0.0 |" in markdown(table.rows)
    assert "| **failed** |" in markdown([replace(table.rows[0], outcome="failed")])


# --- an interpreter with torch alone


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with pip and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["a folder", "no folder"])
def test_a_package_that_is_nowhere_is_named_in_one_line(given: bool, bare: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tools.check.gpu_check.wheels import *\n"
        "try: install_what_is_missing(Path(sys.argv[1]) if len(sys.argv) > 1 else None, Path(sys.argv[-1] + '/site'))\n"
        "except WheelsError as error: print(error)"
    )
    folder = tmp_path / "wheels"
    folder.mkdir()
    arguments = [str(folder)] if given else []
    result = subprocess.run([bare, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    (line,) = result.stdout.splitlines()
    assert any(f"lacks {requirement}, and " in line for requirement in wheels.requirements())
    assert "tools/setup/gather_wheels.sh makes the folder" in line


def test_wheels_that_are_not_missing_are_not_installed(tmp_path: Path) -> None:
    assert wheels.install_what_is_missing(None, tmp_path / "site") == []
    with pytest.raises(wheels.WheelsError, match="there is no such folder"):
        wheels.install_what_is_missing(tmp_path / "nowhere", tmp_path / "site")


def test_the_requirements_are_those_of_the_extra() -> None:
    found = wheels.requirements()
    assert {"ninja>=1.11", "setuptools>=68", "omegaconf>=2.3", "pytest>=8"} <= set(found)
    assert not [name for name in found if name.startswith("torch")]


# --- sections, as far as a CPU shows them


def test_every_section_has_a_module() -> None:
    folder = ROOT / "tools/check/gpu_check/sections"
    assert [name for name in SECTIONS if not (folder / f"{name}.py").exists()] == []


@with_kernels
def test_an_element_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = calls.CASES[0]
    assert calls.statistics(case, torch.float32, "cpu").passed
    whole = calls.vocab_parallel_policy_stats

    def shorter(logits: torch.Tensor, target: torch.Tensor, **arguments: object) -> object:
        return whole(logits, target, vocab_size=case.vocab - 1, **arguments)

    monkeypatch.setattr(calls, "vocab_parallel_policy_stats", shorter)
    assert calls.statistics(case, torch.float32, "cpu").passed is False


def test_a_reward_that_does_not_rise_by_more_than_chance_has_failed() -> None:
    def records(rise: float, mismatch: float = 4e-7) -> list[dict]:
        return [
            {
                "reward/mean": 0.4 + (rise if step >= 10 else 0.0),
                "reward/std": 0.3,
                "mismatch/abs_log_ratio": mismatch,
                "time/step_s": 1.0,
                "train/skipped_steps": 0.0,
                "backend": "cpu",
            }
            for step in range(20)
        ]

    outcomes = {rise: [found.passed for found in judge(records(rise), 64)] for rise in (0.0, 0.05, 0.15)}
    assert outcomes == {0.0: [False, True, True, None], 0.05: [False, True, True, None], 0.15: [True, True, True, None]}
    assert judge(records(0.15, mismatch=1e-5), 64)[1].passed is False


def test_the_spelling_task_grades_letters_in_their_places() -> None:
    from megatron_dppo.tasks.config import TaskConfig

    task = SpellingTask(TaskConfig(name="spelling", kind="custom", size=5, seed=1))
    problem = task[3]
    assert problem.answer == problem.question.rpartition(" ")[2][::-1]
    assert task.score(problem, problem.answer) == 1.0
    assert task.score(problem, "") == 0.0
    assert 0.0 < task.score(problem, problem.answer[0]) < 1.0
    assert task.score(problem, problem.answer + problem.answer) == 0.5


@pytest.mark.parametrize(
    ("code", "output", "passed", "figures"),
    [
        (0, "========= ERROR SUMMARY: 0 errors\n", True, "ERROR SUMMARY: 0 errors"),
        (9, "========= ERROR SUMMARY: 3 errors\n", False, "something was found: ERROR SUMMARY: 3 errors"),
        (0, "calls went well\n", False, "exit code 0: it said nothing"),  # the tool itself did not start
        (1, "========= Error: Device not supported\n", False, "exit code 1: Error: Device not supported"),
    ],
)
def test_a_sanitizer_passes_if_it_says_so(code: int, output: str, passed: bool, figures: str) -> None:
    found = sanitizers.judged(code, output)
    assert (found.passed, found.figures) == (passed, figures)


def test_counters_are_read_from_the_raw_page() -> None:
    names = ['"ID"', '"Kernel Name"', *(f'"{name}"' for name in counters.METRICS)]
    kernel = '"_ZN13megatron_dppo4cuda47_GLOBAL__N__1234_row_partials_cu_1220row_partials_kernelIfEEv"'
    lines = ["==PROF== Connected", ",".join(names), '"","","ns","byte","%","%","register/thread"']
    lines.append(f'"0",{kernel},"1,250,000","3000000000","88.5","61","32"')
    (found,) = counters.findings_of("\n".join(lines))
    assert found.name == "row_partials_kernel"
    assert found.values["seconds"] == pytest.approx(1.25e-3)
    assert "3000 MB, 88 % of the peak of memory, 61 % of the warps active, 32 registers" in found.figures
    assert counters.findings_of("==ERROR== no permission") == []


# --- the whole


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@with_kernels
def test_a_bare_interpreter_without_network_runs_every_section_to_its_end(tmp_path: Path) -> None:
    """Torch alone, borrowed from here; everything else comes from wheels, which are gathered before."""
    if subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True).returncode:
        pytest.skip("this system gives no network namespaces")
    folder = tmp_path / "wheels"
    gather = [ROOT / "tools/setup/gather_wheels.sh", folder]
    subprocess.run(gather, env={**os.environ, "PYTHON": sys.executable}, check=True, timeout=600)
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    for name in ("torch", "torchgen", "functorch", "sympy", "networkx", "mpmath", "jinja2", "markupsafe", "filelock"):
        borrow(name, site)
    for name in ("fsspec", "typing_extensions", "torch.libs"):
        borrow(name, site)
    inner = f"ip link set lo up && exec {SCRIPT} --device cpu --output {tmp_path}/out"
    command = ["unshare", "--net", "--map-root-user", "bash", "-c", inner]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": str(python), "WHEELS": str(folder)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3500)
    rows = rows_in(tmp_path / "out")
    assert result.returncode == 0, [row for row in rows if row["outcome"] in ("failed", "not run")] or result.stderr
    assert {row["section"] for row in rows} == {"preparation", *SECTIONS}
    assert [row["outcome"] for row in rows if row["check"] == "reward"] == ["passed"]


def borrow(name: str, site: Path) -> None:
    """Link a package and its metadata out of this interpreter's folder."""
    here = Path(torch.__file__).parents[1]
    for path in (*here.glob(name), *here.glob(f"{name}.py"), *here.glob(f"{name}-*.dist-info")):
        (site / path.name).symlink_to(path)
