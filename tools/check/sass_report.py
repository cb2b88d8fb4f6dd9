"""What the compiler made of the CUDA kernels, held against a budget. Needs nvcc, no GPU.

    python tools/check/sass_report.py [--archs sm_80,sm_90a,sm_100] [--nvdisasm PATH]

For every kernel and architecture: registers, stack, spills and local-memory accesses; and for its hot loop (the one with
the most 128-bit loads, without the rare loops inside it) the number of those loads and of instructions per element.
sass_budget.json limits each of them. Without nvdisasm the hot loops and local-memory accesses are left out, with a
notice. Exit status 1 if over.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
from build_extension import NVCC_FLAGS, find_cuda_home

BUDGET = Path(__file__).with_name("sass_budget.json")
# Of a kernel's first template argument, or of what a kernel without one counts.
ELEMENT_BYTES = {"float": 4, "__nv_bfloat16": 2, "__half": 2, "tile_hash_kernel": 4}
PTXAS = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default="sm_80,sm_90a,sm_100")
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"))
    options = parser.parse_args()
    cuda_home = find_cuda_home()
    if cuda_home is None:
        print("sass_report: no nvcc: put it on PATH or set CUDA_HOME", file=sys.stderr)
        return 2
    if options.nvdisasm is None:
        print("sass_report: no nvdisasm: hot loops are not checked (PyPI has it as nvidia-cuda-nvdisasm)")
    budget = json.loads(BUDGET.read_text())
    violations = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        for arch in options.archs.split(","):
            for kernel, figures in inspect(source, arch, cuda_home / "bin/nvcc", options.nvdisasm).items():
                print(f"{arch:7} {kernel:40}", " ".join(f"{name}={value:g}" for name, value in figures.items()))
                violations += [f"{arch} {kernel}: {text}" for text in over_budget(kernel, figures, budget)]
    print("\n".join(violations) or "within budget")
    return 1 if violations else 0


def inspect(source: Path, arch: str, nvcc: Path, nvdisasm: str | None) -> dict[str, dict[str, float]]:
    """Figures of every kernel of a source file, by its name without namespace and arguments."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernel.cubin")
        log = output_of(str(nvcc), *NVCC_FLAGS, f"-arch={arch}", "-Xptxas=-v", "-cubin", "-o", cubin, str(source))
        sass = output_of(nvdisasm, "-c", cubin) if nvdisasm else ""
    sections = dict(section.split(":", 1) for section in re.split(r"^\.text\.", sass, flags=re.MULTILINE)[1:])
    found = {}
    for symbol, stack, stores, loads, registers in PTXAS.findall(log):
        name = readable_name(symbol)
        found[name] = {"registers": float(registers), "stack": float(stack), "spills": float(stores) + float(loads)}
        if symbol in sections:
            found[name] |= sass_figures(sections[symbol], name)
    if not found:
        raise RuntimeError(f"{source.name}: nvcc reported no kernel:\n{log}")
    return found


def sass_figures(section: str, kernel: str) -> dict[str, float]:
    lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in section.splitlines()]
    figures = {"local": float(sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines))}
    argument = re.search(r"<(\w+)[,>]", kernel)
    element = argument[1] if argument else kernel
    if element not in ELEMENT_BYTES:
        return figures
    hot = max(loops(lines), key=wide_loads, default=[])
    loads = wide_loads(hot)
    elements = loads * 16 / ELEMENT_BYTES[element]
    return figures | {"loads_128": loads, "instructions_per_element": round(len(hot) / elements, 2) if loads else 0.0}


def wide_loads(instructions: list[str]) -> int:
    return sum("LDG.E.128" in line for line in instructions)


def loops(lines: list[str]) -> list[list[str]]:
    """Each loop's own instructions: from a label to the backward branch to it, without the loops inside."""
    labels, spans = {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = i
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and branch[1] in labels:
            spans.append((labels[branch[1]], i))
    found = []
    for begin, end in spans:
        inner = [range(a, b + 1) for a, b in spans if begin <= a and b <= end and (a, b) != (begin, end)]
        own = [i for i in range(begin, end + 1) if not any(i in span for span in inner)]
        found.append([lines[i] for i in own if lines[i].endswith(";")])
    return found


def over_budget(kernel: str, figures: dict[str, float], budget: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    name = kernel.split("<")[0]
    limits = {side: budget["*"].get(side, {}) | budget.get(name, {}).get(side, {}) for side in ("max", "min")}
    return [
        f"{figure} is {figures[figure]:g}, the limit {side} {limit:g}"
        for side, per_figure in limits.items()
        for figure, limit in per_figure.items()
        if figure in figures and (figures[figure] > limit if side == "max" else figures[figure] < limit)
    ]


def readable_name(symbol: str) -> str:
    name = output_of("c++filt", symbol).strip().removeprefix("void ")
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    return re.sub(r"\(.*", "", name).rsplit("::", 1)[-1]


def output_of(*command: str) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
