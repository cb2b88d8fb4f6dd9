#!/usr/bin/env python3
"""Keep what stands behind a figure: the configuration and metrics of a run, and which commit, command and machine made them.

    python tools/check/record_run.py runs/quickstart docs/records/quickstart --command tools/quickstart.sh

Writes config.yaml, metrics.jsonl and about.json into the record's folder (docs/records/README.md describes them), draws
docs/figures/NAME.png from them and writes the record's row in the README's table of results. The commit is HEAD, which
must be what ran: refused if the code differs from HEAD or if HEAD is younger than the run. ``--commit`` names another.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tools.plot_run import plot, read_metrics

CODE = ("megatron_dppo", "csrc", "examples", "tools", "setup.py")  # what a run depends on
PACKAGES = ("torch", "megatron-core", "transformers")
DIGITS = 6  # significant ones: a record is read by people and drawn, not resumed from
STEPS_COMPARED = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("record", type=Path, help="folder of the record, docs/records/NAME")
    parser.add_argument("--command", required=True, help="what was typed to start the run")
    parser.add_argument("--commit", help="commit that ran (default: HEAD, if it can have been)")
    options = parser.parse_args()
    import yaml

    started = (options.run / "config.yaml").stat().st_mtime
    ended = (options.run / "metrics.jsonl").stat().st_mtime
    figure = ROOT / "docs" / "figures" / f"{options.record.name}.png"
    write_record(
        options.record,
        yaml.safe_load((options.run / "config.yaml").read_text(encoding="utf-8")),
        read_metrics(options.run),
        command=options.command,
        draw=f"python tools/plot_run.py docs/records/{options.record.name} --output docs/figures/{figure.name}",
        commit=options.commit or commit_that_ran(started),
        ended=ended,
    )
    figure.parent.mkdir(exist_ok=True)
    plot([options.record], figure)
    readme = ROOT / "README.md"
    text, row = readme.read_text(encoding="utf-8"), table_row(options.record)
    readme.write_text(with_row(text, options.record.name, row), encoding="utf-8")
    print(row)
    return 0


def write_record(
    folder: Path,
    config: Any,
    metrics: list[dict[str, Any]],
    command: str,
    draw: str,
    commit: str,
    ended: float,
) -> None:
    """Write the three files of a record.

    Args:
        folder: docs/records/NAME.
        config: everything that was set, as YAML can hold it.
        metrics: one object a line.
        command: what was typed.
        draw: the command that draws the figure from the record.
        commit: whose code ran.
        ended: when the last figure was measured, in seconds since 1970.
    """
    import yaml  # here: benchmarks import this file where there is little but torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(without_places(config), sort_keys=False), encoding="utf-8")
    lines = [json.dumps(shortened(record), ensure_ascii=False) + "\n" for record in metrics]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    about = {
        "commit": commit,
        "command": command,
        "date": datetime.datetime.fromtimestamp(ended, datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "draw": draw,
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def commit_that_ran(started: float) -> str:
    """HEAD, if its code can be what ran from ``started`` on."""
    changed = _git("status", "--porcelain", "--", *CODE)
    if changed:
        raise SystemExit(
            f"the code differs from HEAD, so no commit says what ran; commit it, or pass --commit:\n{changed}"
        )
    if int(_git("log", "-1", "--format=%ct")) > started:
        raise SystemExit("HEAD is younger than the run: pass --commit with the commit that ran")
    return _git("rev-parse", "HEAD")


def without_places(value: Any) -> Any:
    """Paths relative to the repository, or without their folder if they lie elsewhere: where is nobody else's business."""
    if isinstance(value, dict):
        return {key: without_places(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_places(entry) for entry in value]
    if isinstance(value, str) and value.startswith("/"):
        path = Path(value)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return value


def shortened(value: Any) -> Any:
    """Numbers of ``DIGITS`` significant digits."""
    if isinstance(value, dict):
        return {key: shortened(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shortened(entry) for entry in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    listed = (
        subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    )
    return {
        "cpu": cpu[1] if cpu else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": re.findall(r"GPU \d+: (.+?) \(UUID", listed.stdout) if listed else [],
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def table_row(record: Path) -> str:
    """The record's line in the README's table of results."""
    metrics = read_metrics(record)
    steps = [entry for entry in metrics if "reward/mean" in entry]
    about = json.loads((record / "about.json").read_text(encoding="utf-8"))

    def of(name: str, among: list[dict[str, Any]] = steps) -> list[float]:
        return [entry[name] for entry in among if entry.get(name) is not None]

    reward, accuracy = of("reward/mean"), of("eval/accuracy", metrics)
    first, last = statistics.fmean(reward[:STEPS_COMPARED]), statistics.fmean(reward[-STEPS_COMPARED:])
    generated, updated = of("throughput/rollout_tokens_per_s"), of("throughput/update_tokens_per_s")
    cells = (
        f"[{record.name}](docs/records/{record.name})",
        f"`{about['command']}`",
        str(len(steps)),
        f"{first:.2f} -> {last:.2f}",
        f"{accuracy[0]:.2f} -> {accuracy[-1]:.2f}",
        f"{max(of('mismatch/abs_log_ratio')):.1e}",
        f"{statistics.median(of('time/step_s')):.3g} s",
        f"{statistics.median(generated):.0f} / {statistics.median(updated):.0f}",
        f"{max(of('memory/peak_bytes')) / 1e9:.2g} GB",
    )
    return f"| {' | '.join(cells)} |"


def with_row(text: str, name: str, row: str) -> str:
    """``text`` with ``row`` in the place of record ``name``'s line in the table of results, or as its last line."""
    lines = text.splitlines(keepends=True)
    rows = [i for i, line in enumerate(lines) if re.match(r"\| \[\w+\]\(docs/records/", line)]
    own = [i for i in rows if lines[i].startswith(f"| [{name}](")]
    if not rows or len(own) > 1:
        raise SystemExit(f"README.md has no table of results, or several rows for {name}; the row is\n{row}")
    at = own[0] if own else rows[-1] + 1
    return "".join([*lines[:at], row + "\n", *lines[at + len(own) :]])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
