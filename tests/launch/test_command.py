"""`megatron-dppo launch`: what it prints, and what it refuses at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_dppo.launch.command import main
from megatron_dppo.launch.recipes import load_recipe
from tests.launch.jobs import ON_GPUS, QUICKSTART

GPUS = ("launch.trainer_nodes=2", "launch.server_nodes=1", "launch.gpus_per_node=8")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("cluster", "shown"),
    [
        ("slurm", "sbatch --parsable"),
        ("local", "-m megatron_dppo.launch.agent --nodes 2"),
        ("kubernetes", "kind: Job"),
    ],
)
def test_a_dry_run_shows_everything_and_does_nothing(cluster, shown, tmp_path, capsys) -> None:
    assert main(["--recipe", str(ON_GPUS), f"cluster={cluster}", "run.name=dry", *GPUS, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert shown in printed
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--recipe", "dppo-nothing"], "recipe dppo-nothing"),
        (["--recipe", str(QUICKSTART), "cluster=slurm"], "no sbatch on this host"),
        (["--recipe", str(QUICKSTART), "cluster=moon"], "moon"),
        (["--recipe", str(QUICKSTART), "cluster=kubernetes"], "add --dry-run"),
        (["--recipe", str(QUICKSTART), "launch.processes_per_node=3"], "does not divide the 3 ranks"),
        (["--recipe", str(QUICKSTART), "launch.gpus_per_node=8"], "but this machine has"),
        (["--recipe", str(QUICKSTART), "launch.server_node=1"], "did you mean `launch.server_nodes`"),
        (["--recipe", str(QUICKSTART), "run.name=.."], "run.name"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm's, first on the path; what it says is in the files beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "sbatch"
    command.write_text(
        '#!/bin/sh\ncat "$(dirname "$0")/says" >&2; echo "7;cluster"; exit $(cat "$(dirname "$0")/code")\n'
    )
    command.chmod(0o755)
    (folder / "says").write_text("")
    (folder / "code").write_text("0")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_job_for_slurm_is_written_with_its_configuration_and_submitted(sbatch, tmp_path, capsys) -> None:
    assert main(["--recipe", str(QUICKSTART), "cluster=slurm", "run.name=queued", "train.steps=3"]) == 0
    assert "submitted: 7\n" in capsys.readouterr().out
    folder = tmp_path / "runs" / "queued" / "launch"
    kept = load_recipe(folder / "config.yaml")
    assert (kept.train.steps, kept.run.name, kept.launch.executor) == (3, "queued", "slurm")
    assert (folder / "job.sbatch").read_text().startswith("#!/bin/bash\n#SBATCH --job-name=queued\n")
    assert (folder / "job.sbatch").stat().st_mode & 0o077 == 0  # launch.env is in it


def test_a_job_that_slurm_refuses_is_told_with_its_reason(sbatch, capsys) -> None:
    (sbatch / "code").write_text("1")
    (sbatch / "says").write_text("sbatch: error: invalid partition\n")
    assert main(["--recipe", str(QUICKSTART), "cluster=slurm", "run.name=refused"]) == 3
    assert "invalid partition" in capsys.readouterr().err


def test_a_run_that_must_be_new_may_go_on_once_it_has_started(sbatch, tmp_path, capsys) -> None:
    never = ["--recipe", str(QUICKSTART), "cluster=slurm", "run.name=new", "run.resume=never"]
    assert main(never) == 0
    assert load_recipe(tmp_path / "runs" / "new" / "launch" / "config.yaml").run.resume == "auto"
    (tmp_path / "runs" / "new" / "config.yaml").write_text("{}\n")  # as the trainer's first start leaves it
    assert main(never) == 2
    assert "holds a run already" in capsys.readouterr().err
