"""The command behind tools/gpu_check.sh: prepares the interpreter that runs it, then makes every section's checks.

    python -m tools.check.gpu_check [--device cpu] [--quick] [--only kernels,training] [--wheels FOLDER]

Rows are printed and appended to OUTPUT/rows.jsonl as they come; OUTPUT/table.md has all of them at the end, OUTPUT/log.txt
what the checks printed. ``--device cpu`` takes the same path at tiny sizes: its times mean nothing.
Exit code: 0 all passed, 1 something failed or was not run, 2 it could not begin, 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from tools.check.gpu_check.extension import ROOT, ExtensionError, ask_torch, build_what_is_missing
from tools.check.gpu_check.findings import Options
from tools.check.gpu_check.sections import SECTIONS
from tools.check.gpu_check.supervise import run_section
from tools.check.gpu_check.table import Row, Table
from tools.check.gpu_check.wheels import WheelsError, install_what_is_missing

CANNOT_BEGIN, NO_GPU = 2, 3  # exit codes
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
QUICK_S = 480.0  # of --quick, preparation included
_BUILD_LIMIT_S = 900.0


def main() -> int:
    began = time.monotonic()
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started ends too
    output, wheels = options.output.resolve(), options.wheels
    output.mkdir(parents=True, exist_ok=True)
    table, log, site = Table(output), output / "log.txt", site_of_this_interpreter()
    log.write_text("")
    seconds = QUICK_S if options.seconds is None and options.quick else options.seconds
    deadline = began + seconds if seconds is not None else float("inf")
    try:
        found = ask_torch(options.device)
        if options.device == "cuda" and not found["gpus"]:
            print(f"no GPU: torch {found['torch']} sees no CUDA device. Nothing was checked.", file=sys.stderr)
            return NO_GPU
        start = time.monotonic()
        names = install_what_is_missing(wheels, site)
        put_first(site)
        installed = f"{len(names)} wheels" if names else "nothing was missing"
        table.add(Row("preparation", "wheels", "passed", installed, seconds=time.monotonic() - start))
        start = time.monotonic()
        limit_s = min(_BUILD_LIMIT_S, deadline - start)
        built = build_what_is_missing(found, options.device, log, limit_s)
        what = f"for {found['arch'] or 'this CPU'}, torch {found['torch']}"
        figures = f"built {what}" if built else f"was there {what}"
        table.add(Row("preparation", "extension", "passed", figures, seconds=time.monotonic() - start))
    except (WheelsError, ExtensionError) as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return CANNOT_BEGIN
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        given = Options(options.device, options.quick, options.sanitizers, Path(scratch))
        for section in options.only:
            if time.monotonic() >= deadline:
                table.add(Row(section, section, "not run", "the time of the whole was over"))
                continue
            for row in run_section(section, given, deadline, log, options.row_limit):
                table.add(row)
    bad = sum(row.is_bad for row in table.rows)
    print(
        f"\n{table.finish()}\n{len(table.rows)} rows, {bad} bad, {time.monotonic() - began:.0f} s; {output}/rows.jsonl"
    )
    return int(bad > 0)


def parse_arguments() -> argparse.Namespace:
    """The options, each checked."""
    sections = "\n".join(f"  {name:13} {what}" for name, what in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="gpu_check",
        description=__doc__,
        epilog=f"sections:\n{sections}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def names(known: tuple[str, ...], what: str):
        def parse(text: str) -> tuple[str, ...]:
            given = tuple(name for name in text.split(",") if name)
            for name in given:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"no {what} {name!r}: there are {', '.join(known)}")
            return tuple(name for name in known if name in given)

        return parse

    everything = tuple(SECTIONS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help=f"fewer turns and cases, {QUICK_S:.0f} s at most")
    parser.add_argument("--only", default=everything, type=names(everything, "section"), metavar="SECTION,...")
    parser.add_argument("--skip", default=(), type=names(everything, "section"), metavar="SECTION,...")
    parser.add_argument(
        "--sanitizers",
        type=names(SANITIZERS, "sanitizer"),
        metavar="TOOL,...",
        help=f"of {', '.join(SANITIZERS)} (default: all; with --quick memcheck)",
    )
    parser.add_argument("--row-limit", type=float, metavar="SECONDS", help="no check gets more than this")
    parser.add_argument("--seconds", type=float, help="what has not begun then is not run (default with --quick: 480)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="for what the interpreter lacks (WHEELS=)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_check", metavar="FOLDER")
    options = parser.parse_args()
    options.only = tuple(name for name in options.only if name not in options.skip)
    if options.sanitizers is None:
        options.sanitizers = SANITIZERS[:1] if options.quick else SANITIZERS
    return options


def site_of_this_interpreter() -> Path:
    """Where its wheels go: what fits one interpreter need not fit another."""
    name = f"{sys.implementation.cache_tag}-{hashlib.sha256(sys.executable.encode()).hexdigest()[:8]}"
    return ROOT / "build" / "gpu_check_site" / name


def put_first(site: Path) -> None:
    """Let every process that is started find the wheels' packages and programs, and this package."""
    paths = [str(ROOT), str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["PATH"] = os.pathsep.join([str(site / "bin"), os.environ.get("PATH", os.defpath)])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
