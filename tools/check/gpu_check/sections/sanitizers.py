"""The calls of ``calls.py`` under compute-sanitizer, with its checks limited to this project's kernels."""

from __future__ import annotations

import os
import subprocess
import sys

from tools.check.gpu_check.extension import ROOT
from tools.check.gpu_check.findings import Check, Finding, Options, Skipped
from tools.check.gpu_check.sections.machine import find_program

LIMIT_S = 400.0
_FOUND = 9  # the exit code of a program in which something was found


def checks(options: Options) -> list[Check]:
    """A row for each tool that was asked for."""
    return [Check(tool, lambda tool=tool: sanitize(options, tool), LIMIT_S) for tool in options.sanitizers]


def sanitize(options: Options, tool: str) -> Finding:
    if not options.on_gpu:
        raise Skipped("compute-sanitizer needs a GPU; the emulated kernels run under ASan, TSan and UBSan (tests/csrc)")
    if (program := find_program("compute-sanitizer")) is None:
        raise Skipped("compute-sanitizer is not installed")
    done = subprocess.run(
        command(program, tool, options.device),
        cwd=ROOT,
        env=environment(tool),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    print(done.stdout[-40_000:], flush=True)
    return judged(done.returncode, done.stdout)


def command(program: str, tool: str, device: str) -> list[str]:
    """The whole command line."""
    # The mangled name of a kernel has its namespace in it.
    only_ours = ["--kernel-name", "kns=megatron_dppo"]
    tells = ["--tool", tool, "--error-exitcode", str(_FOUND), "--target-processes", "all", "--print-limit", "20"]
    return [program, *tells, *only_ours, sys.executable, "-m", "tools.check.gpu_check.sections.calls", device]


def environment(tool: str) -> dict[str, str]:
    """Within a block of torch's caching allocator nothing is out of bounds, and everything was written once."""
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
    return {**os.environ, **uncached}


def judged(code: int, output: str) -> Finding:
    """What the tool's last lines say."""
    summaries = [line.lstrip("= ") for line in output.splitlines() if "SUMMARY" in line]
    if code == 0 and summaries:
        return Finding(summaries[-1], True)
    said = [line for line in output.splitlines() if line.startswith("=========")] or ["it said nothing"]
    what = "something was found" if code == _FOUND else f"exit code {code}"
    return Finding(f"{what}: {(summaries or said[-1:])[-1].lstrip('= ')}", False)
