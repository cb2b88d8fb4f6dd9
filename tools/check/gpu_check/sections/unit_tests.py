"""tests/ops and tests/loss on the device, each file in a process of its own, and what is left out on a CPU."""

from __future__ import annotations

import subprocess
import sys

from tools.check.gpu_check.extension import ROOT
from tools.check.gpu_check.findings import Check, Finding, Options

LIMIT_S = 300.0
FOLDERS = {
    "tests/ops": ["tests/ops"],
    "tests/loss": ["tests/loss"],
    "operators": ["tests/csrc/test_operator_registration.py"],
}
QUICK = {
    "tests/ops": ["tests/ops/test_policy_stats.py", "tests/ops/test_gradient_in_forward.py"],
    "tests/loss": ["tests/loss/test_no_waiting.py"],
}


def checks(options: Options) -> list[Check]:
    """On a CPU, and with --quick, a part: the whole is what the project's own runs of the tests are for."""
    groups = FOLDERS if options.on_gpu and not options.quick else QUICK
    return [Check(name, lambda paths=paths: run(options, paths), LIMIT_S) for name, paths in groups.items()]


def run(options: Options, paths: list[str]) -> Finding:
    command = [sys.executable, "-m", "pytest", "--device", options.device, "-m", "not nightly", *paths]
    if not options.on_gpu:
        command += ["-k", "not emulated"]  # kernels that this run is not about
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout[-40_000:], flush=True)
    words = (" passed", " failed", " error")
    summary = [line for line in done.stdout.splitlines() if any(word in line for word in words)]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    figures = summary[-1].strip("= ") if summary else f"exit code {done.returncode}"
    if failed:
        figures += f"; first: {failed[0][:200]}"
    return Finding(figures, done.returncode == 0)
