"""``megatron-dppo doctor``: a line for everything, a remedy for what fails, and nothing that a check does ends it."""

from __future__ import annotations

import importlib.machinery
import os
import socket
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_dppo.cli import main
from megatron_dppo.launch.config import Recipe
from megatron_dppo.launch.doctor import checks, host, loss_test, servers, software, trials
from megatron_dppo.launch.doctor.checks import CHECKS, examine
from megatron_dppo.launch.doctor.lines import Check, Line, Subject, table

Usage = namedtuple("Usage", "total used free")
SERVER_PYTHON = os.environ.get("MEGATRON_DPPO_SGLANG_PYTHON")


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    recipe = Recipe()
    recipe.run.root = str(tmp_path / "runs")
    return Subject(recipe, None, is_named=True)


def test_this_host_has_no_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = Path(__file__).parents[3] / "examples" / "conf" / "quickstart.yaml"
    code = main(["doctor", "--recipe", str(quickstart), f"run.root={tmp_path}", "--quick"])
    said = capsys.readouterr().out
    assert code == 0, said
    for check in ("python", "megatron-core", "extension", "disk speed", "loss on torch", "one-step train"):
        assert f" {check} " in said


def test_a_check_that_raises_or_hangs_is_a_line_and_the_others_still_run(subject: Subject) -> None:
    def raises(_: Subject) -> Line:
        raise OSError("no such thing\nwith more lines")

    never = threading.Event()
    given = (
        Check("raises", raises),
        Check("hangs", lambda _: [Line("", "ok", str(never.wait()))], timeout_s=0.2),
        Check("works", lambda _: Line("works", "ok", "yes")),
    )
    lines = list(examine(subject, quick=True, checks=given))
    never.set()
    assert [line.state for line in lines] == ["error", "error", "ok"]
    assert lines[0].found == "OSError: no such thing"
    assert "within 0.2 s" in lines[1].found
    assert all(line.remedy for line in lines[:2])


def test_an_error_is_exit_code_1_and_its_remedy_stands_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Check("disk", lambda _: Line("disk room", "error", "0.1 GiB free", "run.root=FOLDER"))
    monkeypatch.setattr(checks.examine, "__kwdefaults__", {"checks": (broken,)})
    assert main(["doctor", "--quick"]) == 1
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.split()[0] == "error"
    assert second.strip() == "-> run.root=FOLDER"


def test_overrides_need_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "run.root=elsewhere"])
    assert "--recipe" in capsys.readouterr().err
    assert main(["doctor", "--recipe", "no-such-recipe"]) == 2


def test_every_check_has_a_name_of_its_own_and_a_limit() -> None:
    assert len({check.what for check in CHECKS}) == len(CHECKS)
    assert all(0 < check.timeout_s <= trials.SYNC_S for check in CHECKS)
    assert [check.what for check in CHECKS if check.is_long] == ["one-step train", "sync to a server"]


@pytest.mark.parametrize(
    ("version", "state"), [("0.15.3", "error"), ("0.16.1", "ok"), ("0.19.2", "ok"), ("0.20.0", "error")]
)
def test_megatron_core_has_to_be_of_the_tested_range(
    version: str, state: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    assert software.megatron_core(subject).state == state


def test_the_toolkit_that_is_called_apex_is_not_taken_for_nvidias(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.machinery.PathFinder.invalidate_caches()
    line = software.apex(subject)
    assert "is not NVIDIA's Apex" in line.found
    assert "pip uninstall apex" in line.remedy


@pytest.mark.parametrize(
    ("gpu", "covered"),
    [((8, 0), True), ((8, 6), True), ((9, 0), True), ((7, 5), False), ((10, 0), True), ((12, 0), True)],
)
def test_kernels_run_on_the_gpus_that_they_were_built_for(gpu: tuple[int, int], covered: bool) -> None:
    assert software.is_covered(gpu, "80;90a;100+PTX") is covered
    assert not software.is_covered((9, 1), "90a")
    assert not software.is_covered((8, 0), "86")


def test_kernels_that_are_not_for_this_gpu_are_an_error_with_the_build_to_make(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    if software.backend_report()["cpu"] != "available":
        pytest.skip("the extension is not built")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(software, "_architectures", lambda: [(7, 5)])
    line = software.extension(subject)
    assert line.state == "error"
    assert "MEGATRON_DPPO_CUDA_ARCHS='75'" in line.remedy


def test_a_full_disk_and_small_shared_memory_are_named(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(64 * 2**20, 0, 64 * 2**20))
    assert host.disk(subject)[0].state == "error"
    line = host.shared_memory(subject)
    assert (line.state, line.remedy) == ("note", "docker run --shm-size=16g, or --ipc=host")


def test_a_rendezvous_port_in_use_is_a_note(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert [line.state for line in host.ports(subject)] == ["ok", "note"]


def test_too_few_open_files_are_an_error(subject: Subject) -> None:
    subject.recipe.rollout.sglang.max_concurrent_requests = 10**9
    line = host.open_files(subject)
    assert line.state == "error"
    assert "ulimit -Hn" in line.remedy


@pytest.mark.parametrize(("python", "why"), [("/no/such/python", "does not run"), (sys.executable, "has no SGLang")])
def test_an_interpreter_without_sglang_is_an_error_for_a_run_with_servers(
    python: str, why: str, subject: Subject
) -> None:
    subject.recipe.rollout.engine = "sglang"
    (line,) = servers.sglang(Subject(subject.recipe, python, is_named=True))
    assert line.state == "error"
    assert why in line.found
    assert "--server-python" in line.remedy


def test_a_wrong_kernel_fails_the_loss_test(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    good = loss_test._loss_and_gradient
    monkeypatch.setattr(
        loss_test, "_loss_and_gradient", lambda *a: [1.001 * x if a[0] == "cpu" else x for x in good(*a)]
    )
    states = {line.what: line.state for line in loss_test.loss_backends(subject)}
    assert states["loss on torch"] == "ok"
    assert states["loss on cpu"] in ("error", "note")  # a note where it is not built


def test_the_table_is_aligned() -> None:
    text = table([Line("a", "ok", "fine"), Line("longer", "error", "broken", "mend it")])
    assert text.splitlines() == ["ok     a       fine", "error  longer  broken", "               -> mend it"]


@pytest.mark.nightly
def test_one_step_of_training_works(subject: Subject) -> None:
    line = trials.one_step(subject)
    assert line.state == "ok", line.found


@pytest.mark.nightly
@pytest.mark.sglang
def test_a_sync_to_a_real_server_works(subject: Subject) -> None:
    if SERVER_PYTHON is None:
        pytest.skip("MEGATRON_DPPO_SGLANG_PYTHON does not name an interpreter that has SGLang")
    line = trials.one_sync(Subject(subject.recipe, SERVER_PYTHON, is_named=True))
    assert line.state == "ok", line.found
