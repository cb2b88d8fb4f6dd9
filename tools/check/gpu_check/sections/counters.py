"""The kernels under Nsight Compute: time, memory traffic and occupancy, by the hardware's own counters."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys

import torch

from tools.check.gpu_check.extension import ROOT
from tools.check.gpu_check.findings import Check, Finding, Options, Skipped
from tools.check.gpu_check.sections.kernels import make_problem
from tools.check.gpu_check.sections.machine import find_program

LIMIT_S = 240.0
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "memory traffic",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of the peak of memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "of the warps active",
    "launch__registers_per_thread": "registers",
}


def checks(options: Options) -> list[Check]:
    """One run of every kernel, at TP 4's size."""
    return [Check("kernels under ncu", lambda: profile(options), LIMIT_S)]


def profile(options: Options) -> list[Finding]:
    if not options.on_gpu:
        raise Skipped("Nsight Compute needs a GPU; tools/check/sass_report.py reads the machine code without one")
    if options.quick:
        raise Skipped("left out by --quick")
    if (program := find_program("ncu")) is None:
        raise Skipped("ncu is not installed")
    done = subprocess.run(command(program), cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    print(done.stdout[-20_000:], done.stderr[-5_000:], flush=True)
    found = findings_of(done.stdout)
    if done.returncode or not found:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line] or [
            "no kernel is in its output"
        ]
        return [Finding(f"exit code {done.returncode}: {said[0]}", False)]
    return found


def command(program: str) -> list[str]:
    """Clocks are left alone: who may not change them would get an error."""
    chosen = ["--metrics", ",".join(METRICS), "--kernel-name-base", "mangled", "--kernel-name", "regex:megatron_dppo"]
    output = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--target-processes", "all"]
    return [program, *output, *chosen, sys.executable, "-m", "tools.check.gpu_check.sections.counters"]


def findings_of(output: str) -> list[Finding]:
    """Rows of ncu's raw page as CSV: a line of names, one of units, then one a launch."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line and METRIC_NAME.search(line)), None)
    if start is None:
        return []
    found = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        values = {name: number(row.get(name)) for name in METRICS}
        if any(value is None for value in values.values()):
            continue  # the line of units
        seconds = (values["gpu__time_duration.sum"] or 0.0) / 1e9
        traffic, peak, active, registers = (values[name] or 0.0 for name in list(METRICS)[1:])
        figures = (
            f"{1e3 * seconds:.3f} ms, {traffic / 1e6:.0f} MB, {peak:.0f} % of the peak of memory, {active:.0f} % of the "
            f"warps active, {registers:.0f} registers"
        )
        keys = {"seconds": seconds, "bytes": traffic, "percent_of_peak": peak, "registers": registers}
        found.append(Finding(figures, None, keys, name=short_name(row["Kernel Name"])))
    return found


METRIC_NAME = re.compile(re.escape(next(iter(METRICS))))


def number(text: str | None) -> float | None:
    """A figure of ncu's, which may have commas in it."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def short_name(kernel: str) -> str:
    """The function's name out of a mangled or demangled one."""
    found = re.search(r"[a-z_]+_kernel", kernel)
    return found[0].lstrip("_") if found else kernel


def main() -> int:
    """What is profiled."""
    torch.manual_seed(0)
    problem = make_problem(8192, 37_984, "cuda")
    for _, run in problem.run.values():
        run()
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
