"""``python -m megatron_dppo.serve``: servers run, are registered while they do, and end with it.

What it starts only looks healthy; test_training_run.py has a run with the real thing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_dppo.rollout.sglang.servers.registry import read_registry
from megatron_dppo.serve import main
from tests.rollout.sglang.stand_in_server import stand_in_interpreter
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


def write_run(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")  # nobody reads it here
    (folder / "run.yaml").write_text("model:\n  path: model\nrollout:\n  sglang:\n    registry: registry\n")


class Serve:
    """The command, run in a folder."""

    def __init__(self, folder: Path, *arguments: str, before: str = "") -> None:
        write_run(folder)
        self.registry = folder / "registry"
        python = stand_in_interpreter(folder, before)
        command = [sys.executable, "-m", "megatron_dppo.serve", "--config", "run.yaml", "--directory", str(folder)]
        command += [*arguments, f"rollout.sglang.python={python}"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for(self, servers: int) -> list[str]:
        """Addresses of registered servers."""

        def registered() -> bool:
            assert self.process.poll() is None, self.process.communicate()[0]
            return len(read_registry(self.registry)) == servers

        wait_until(registered, within_s=60, what=f"{servers} servers register")
        return read_registry(self.registry)

    def stand_ins(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in children if "healthy.py" in " ".join(process.cmdline())]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    started = []

    def start(*arguments: str, before: str = "") -> Serve:
        started.append(Serve(tmp_path, *arguments, before=before))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()


def test_servers_are_registered_while_they_run_and_started_again(serve):
    command = serve("--servers", "2", "--host", "127.0.0.1")
    before = command.wait_for(2)
    ended = command.stand_ins()[0]
    port = ended.cmdline()[ended.cmdline().index("--port") + 1]
    ended.kill()
    wait_until(lambda: f"http://127.0.0.1:{port}" not in read_registry(command.registry), within_s=30, what="it leaves")
    assert len(set(command.wait_for(2)) & set(before)) == 1
    left = command.stand_ins()
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(timeout=20) == 0
    assert read_registry(command.registry) == []
    assert psutil.wait_procs(left, timeout=5)[1] == []


def test_a_server_that_hangs_is_ended_and_started_again(serve):
    """Its process is there, and says nothing."""
    limits = ("rollout.sglang.hang_timeout_s=3", "rollout.sglang.sync_timeout_s=2")
    command = serve("--servers", "2", "--host", "127.0.0.1", *limits)
    before = command.wait_for(2)
    hung, well = command.stand_ins()
    hung.suspend()
    psutil.wait_procs([hung], timeout=30)
    assert not hung.is_running()
    wait_until(
        lambda: len(set(read_registry(command.registry)) - set(before)) == 1, within_s=30, what="another is there"
    )
    assert len(command.wait_for(2)) == 2
    assert well.is_running()
    command.process.send_signal(signal.SIGTERM)
    output = command.process.communicate(timeout=20)[0]
    assert command.process.returncode == 0
    assert output.count("hangs, and is started again: not healthy for hang_timeout_s = 3 s") == 1


def test_it_ends_with_its_standard_input(serve):
    command = serve("--until-eof")
    command.wait_for(1)
    assert not read_registry(command.registry)[0].startswith("http://127.") or os.uname().nodename == "localhost"
    command.process.stdin.close()
    assert command.process.wait(timeout=20) == 0
    assert read_registry(command.registry) == []


def test_servers_that_keep_failing_end_it_with_what_they_said(serve):
    command = serve(before="echo no memory left; exit 1")
    output = command.process.communicate(timeout=60)[0]
    assert command.process.returncode == 3
    assert "3 starts in a row failed" in output
    assert "no memory left" in output


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rollout.sglang.registry=null", "rollout.sglang.registry"),
        ("rollout.sglang.registry=run.yaml", "is a file with addresses"),
        ("model.path=elsewhere", "there is no elsewhere/config.json"),
        ("rollout.sglang.num_severs=2", "num_servers"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, capsys, override, named):
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["--config", "run.yaml", override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_a_serving_host_imports_no_megatron() -> None:
    """It has no use for it, and would wait seconds for its servers to be started."""
    program = (
        "import megatron_dppo.serve, megatron_dppo.training.serving, sys; assert 'megatron.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
