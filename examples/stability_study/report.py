#!/usr/bin/env python3
"""Figure and table of the stability study, from its committed records.

    python examples/stability_study/report.py docs/records/stability_study --output docs/figures/stability_study.png
    python examples/stability_study/report.py docs/records/stability_study --table      # prints it, as Markdown
    python examples/stability_study/report.py docs/records/stability_study --finish     # once all runs are recorded
    python examples/stability_study/report.py docs/records/stability_study --so-far     # the same before that

--finish draws the figure, writes the table into docs/stability_study.md, and adds to the record what every record has:
config.yaml (the study's list) and about.json. --so-far does it with runs missing; the page says how many are there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from examples.stability_study.collapse import Outcome, outcome, wilson_interval
from examples.stability_study.plan import NO_CURVES, read_study
from examples.stability_study.records import AT_THE_END, BINS, missing, read_lines

PAGE = ROOT / "docs" / "stability_study.md"
FIGURE = ROOT / "docs" / "figures" / "stability_study.png"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PANELS = (
    ("reward", "reward/mean", "linear"),
    ("mismatch: |log pi - log mu| before the first update", "mismatch/abs_log_ratio", "log"),
    ("entropy", "entropy", "linear"),
    ("masked tokens", "dppo/mask_fraction", "linear"),
    ("bad updates: A < 0 and mu - pi >= 0.5", "dppo/bad_update_fraction", "linear"),
)
DRAWN = (
    "none",
    "cispo",
    "minimal_mask_0.5",
    "drpo",
    "ppo_clip_0.2",
    "recomputed_anchor",
    "binary_tv",
    "topk_tv",
)  # of the list: more cannot be told apart
HEAD = (
    "| part | mismatch | method | runs | collapsed (95 % interval) | solved | reward at the end | masked | bad updates, most"
    " | s per step |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="folder with metrics.jsonl")
    parser.add_argument("--output", type=Path, help="PNG to write")
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--mismatch", default="fp8", help="whose runs are drawn (default: %(default)s)")
    parser.add_argument("--finish", action="store_true", help="figure, page and record: for a study that is complete")
    parser.add_argument("--so-far", action="store_true", help="figure, page and record: for one that is not")
    arguments = parser.parse_args()
    lines = read_lines(arguments.record / "metrics.jsonl")
    curves = in_planned_order([line for line in lines if line["part"] not in NO_CURVES])
    if not curves:
        raise SystemExit(
            f"{arguments.record}/metrics.jsonl has no runs yet: examples/stability_study/run.py makes them"
        )
    if arguments.output:
        draw(curves, arguments.mismatch, arguments.output)
    if arguments.table:
        print(table(curves))
    if arguments.finish or arguments.so_far:
        finish(arguments.record, lines, curves, arguments.mismatch, so_far=arguments.so_far)
    return 0


def in_planned_order(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records come in the order in which runs end; those that are not planned any more come last."""
    place = {run.name: at for at, run in enumerate(read_study(Path(__file__).with_name("study.yaml")).runs)}
    return sorted(lines, key=lambda line: place.get(line["name"], len(place)))


def outcome_of(line: dict[str, Any], start: float) -> Outcome:
    """Of a record; a run that could not even make its first step has collapsed."""
    return outcome(_rewards(line) or [0.0], start, line["ended"] == AT_THE_END)


def starts(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mismatch -> mean reward of the first steps, made before any update: of each seed once, as its methods share it."""
    first: dict[str, dict[int, float]] = {}
    for line in lines:
        if rewards := _rewards(line):
            first.setdefault(line["mismatch"], {})[line["seed"]] = rewards[0]
    return {mismatch: statistics.fmean(of_seed.values()) for mismatch, of_seed in first.items()}


def _rewards(line: dict[str, Any]) -> list[float]:
    return [value for value in line["series"]["reward/mean"] if value is not None]


def groups(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """(part, mismatch, method) -> its runs, in the order of their first record."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["part"], line["mismatch"], line["method"]), []).append(line)
    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row per part, mismatch and method."""
    start = starts(lines)
    return "\n".join([HEAD, *(_row(key, runs, start.get(key[1], 0.0)) for key, runs in groups(lines).items())])


def _row(key: tuple[str, str, str], runs: Sequence[dict[str, Any]], start: float) -> str:
    outcomes = [outcome_of(run, start) for run in runs]
    collapsed, solved = sum(o.collapsed for o in outcomes), sum(o.solved for o in outcomes)
    low, high = wilson_interval(collapsed, len(runs))
    last = [o.last for o in outcomes]
    cells = (
        *key,
        str(len(runs)),
        f"{collapsed}/{len(runs)} ({low:.0%} to {high:.0%})",
        f"{solved}/{len(runs)}",
        f"{statistics.fmean(last):.2f} ({min(last):.2f} to {max(last):.2f})",
        _percent(statistics.fmean, _all(runs, "dppo/mask_fraction")),
        _percent(max, _all(runs, "dppo/bad_update_fraction")),
        _number(statistics.median, _all(runs, "time/update_s")),
    )
    return f"| {' | '.join(cells)} |"


def _all(runs: Iterable[dict[str, Any]], name: str) -> list[float]:
    return [value for run in runs for value in run["series"][name] if value is not None]


def _percent(of: Any, values: Sequence[float]) -> str:
    return f"{of(values):.1%}" if values else ""


def _number(of: Any, values: Sequence[float]) -> str:
    return f"{of(values):.2g}" if values else ""


def draw(lines: Sequence[dict[str, Any]], mismatch: str, output: Path) -> None:
    """Medians over seeds with a band from the lowest to the highest; shares masked by the rollout's probability."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: drawing needs an extra: pip install 'megatron-dppo[plots]'") from error

    found = {method: runs for (_, at, method), runs in reversed(groups(lines).items()) if at == mismatch}
    shown = {method: found[method] for method in DRAWN if method in found}  # of several parts, the first one's runs
    if not shown:
        raise SystemExit(f"no run with the mismatch {mismatch!r} is recorded")
    figure, axes = plt.subplots(2, 3, figsize=(17, 9), constrained_layout=True)
    colours = plt.get_cmap("tab10").colors
    for axis, (title, name, scale) in zip(axes.flat, PANELS, strict=False):
        for index, (method, runs) in enumerate(shown.items()):
            steps, lowest, middle, highest = _band([run["series"][name] for run in runs])
            axis.plot(steps, middle, color=colours[index], label=method, linewidth=1.6)
            axis.fill_between(steps, lowest, highest, color=colours[index], alpha=0.1, linewidth=0)
        axis.set(title=title, xlabel="training step", yscale=scale)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7, ncols=2)
    _draw_bins(axes.flat[-1], shown, colours)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)
    print(output)


def _draw_bins(axis: Any, shown: dict[str, list[dict[str, Any]]], colours: Sequence[Any]) -> None:
    width = 0.8 / len(shown)
    for index, (_, runs) in enumerate(shown.items()):
        heights = [statistics.fmean(_all(runs, name) or [0.0]) for name in BINS]
        places = [at + width * (index - (len(shown) - 1) / 2) for at in range(len(BINS))]
        axis.bar(places, heights, width, color=colours[index])
    axis.set(title="masked tokens by the rollout policy's probability")
    axis.set_xticks(range(len(BINS)), [name.rpartition("mu_")[2].replace("_", " - ") for name in BINS])
    axis.grid(alpha=0.3, axis="y")


def _band(curves: Sequence[Sequence[float | None]]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps (from 1), lowest, median and highest over the runs that have the step; steps that none has are left out."""
    steps, lowest, middle, highest = [], [], [], []
    for step in range(max(map(len, curves))):
        values = [v for curve in curves if step < len(curve) and (v := curve[step]) is not None]
        if values:
            steps.append(step + 1)
            lowest.append(min(values))
            middle.append(statistics.median(values))
            highest.append(max(values))
    return steps, lowest, middle, highest


def finish(
    record: Path, lines: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]], mismatch: str, so_far: bool
) -> None:
    """What a study adds to the repository. SystemExit if runs are missing and ``so_far`` was not asked for."""
    import yaml

    from tools.check.record_run import write_record

    path = Path(__file__).with_name("study.yaml")
    planned = read_study(path).runs
    left = missing(planned, list(lines))
    if left and not so_far:
        raise SystemExit(
            f"{len(left)} runs are missing, {left[0].name} first: examples/stability_study/run.py makes them"
        )
    commits = sorted({line["commit"] for line in lines})
    if len(commits) > 1:
        print(f"made by {len(commits)} commits, which each line names; about.json has the last", file=sys.stderr)
    draw(curves, mismatch, FIGURE)
    page = PAGE.read_text(encoding="utf-8")
    told = f"{len(planned) - len(left)} of {len(planned)} runs have been made.\n\n{table(curves)}"
    PAGE.write_text(with_table(page, told), encoding="utf-8")
    write_record(
        record,
        {"study": yaml.safe_load(path.read_text(encoding="utf-8"))},
        read_lines(
            record / "metrics.jsonl"
        ),  # again: a study that goes on may have added to them while the figure was drawn
        command="python examples/stability_study/run.py",
        draw=f"python examples/stability_study/report.py docs/records/{record.name} --output docs/figures/{FIGURE.name}",
        commit=lines[-1]["commit"],
        ended=time.time(),
    )
    print(f"{record}: {len(lines)} runs")


def with_table(page: str, new: str) -> str:
    """``page`` with ``new`` between its marks."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"{PAGE.name} has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
