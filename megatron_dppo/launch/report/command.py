"""Write one HTML page about runs: ``megatron-dppo report runs/NAME [runs/OTHER ...] --output report.html``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dppo.errors import BAD_INPUT, EXIT_BAD_INPUT

_DESCRIPTION = """\
Write one HTML page about one or more runs.

The page has curves of all metrics, the trust region by rollout probability and by position, lengths and rewards, the worst
and the best responses with every token coloured, the time of each phase, and how the runs' configurations differ. It is one
file: it opens from disk, without a network, and can be sent to others. Records (docs/records/NAME) can be given too, and
runs that are not over yet.
"""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dppo report", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; the first is compared with")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)")
    parser.add_argument("--title", help="of the page (default: the names of the runs)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse_arguments(arguments)
    # Imported when asked for: reading a configuration's defaults imports what the trainer is made of.
    from megatron_dppo.launch.report.page import render
    from megatron_dppo.launch.report.page_data import page_data
    from megatron_dppo.launch.report.run_data import read_runs

    try:
        page = render(page_data(read_runs(options.runs), options.title))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page, encoding="utf-8", errors="replace")
    except (*BAD_INPUT, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"wrote {options.output} ({len(page.encode(errors='replace')) / 1e6:.1f} MB)")
    return 0
