"""What an interpreter lacks for gpu_check, installed from a folder of wheels into a folder beside it: no registry is asked.

    python tools/check/gpu_check/wheels.py        prints the requirements (the extra gpu-check of setup.py), one a line

The interpreter's own packages stay as they are: pip is asked what it *would* install, and that goes into the folder.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_STAMP = ".installed"


class WheelsError(Exception):
    """One line: what is missing and what to do."""


def requirements() -> list[str]:
    """The extra gpu-check. setup.py is read, not run: what it imports may not be there yet."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.Assign) and _name(node) in ("OMEGACONF", "EXTRAS")]
    found: dict[str, Any] = {}
    exec(compile(ast.Module(wanted, []), "setup.py", "exec"), found)
    return sorted(set(found["EXTRAS"]["gpu-check"]))


def _name(node: ast.Assign) -> str:
    target = node.targets[0]
    return getattr(target.value if isinstance(target, ast.Subscript) else target, "id", "")


def install_what_is_missing(folder: Path | None, site: Path) -> list[str]:
    """Fill ``site`` with what this interpreter lacks; returns the names of the wheels. Nothing is done if they are there.

    Raises:
        WheelsError: something is neither installed nor in ``folder`` (None: there is no such folder).
    """
    if folder is not None and not folder.is_dir():
        raise WheelsError(f"WHEELS={folder}: there is no such folder")
    wheels = _missing_wheels(folder)
    stamp = site / _STAMP
    names = sorted(Path(wheel).name for wheel in wheels)
    if stamp.exists() and stamp.read_text(encoding="utf-8").split("\n") == names:
        return names
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    if wheels:
        _pip("install", "--no-deps", "--no-compile", "--target", str(site), *wheels)
    stamp.write_text("\n".join(names), encoding="utf-8")
    return names


def _missing_wheels(folder: Path | None) -> list[str]:
    source = [] if folder is None else ["--find-links", str(folder.resolve())]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        try:
            _pip("install", "--dry-run", "--report", str(report), *source, *requirements())
        except _PipError as error:
            where = "and no folder of wheels was given" if folder is None else f"and WHEELS={folder} has no wheel of it"
            lacking = error.lacking()
            said = f"{sys.executable} lacks {lacking}, {where}" if lacking else f"pip: {error.said}"
            raise WheelsError(f"{said}: tools/setup/gather_wheels.sh makes the folder, WHEELS= names it") from None
        planned = json.loads(report.read_text(encoding="utf-8"))["install"]
    return [entry["download_info"]["url"].removeprefix("file://") for entry in planned]


class _PipError(WheelsError):
    def __init__(self, output: str) -> None:
        errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
        self.said = errors[-1] if errors else (output.strip().splitlines() or ["it said nothing"])[-1]
        super().__init__(f"pip: {self.said}")

    def lacking(self) -> str | None:
        """The requirement that nothing satisfies, if that was it."""
        before = "No matching distribution found for "
        return self.said.removeprefix(before) if self.said.startswith(before) else None


def _pip(command: str, *arguments: str) -> None:
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    call = [sys.executable, "-m", "pip", command, "--quiet", "--no-index", *arguments]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _PipError(done.stderr or done.stdout)


if __name__ == "__main__":
    print("\n".join(requirements()))
