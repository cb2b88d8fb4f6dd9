#!/usr/bin/env python3
"""Draw the curves of one or more runs, or records of runs: training reward, held-out accuracy, masked tokens, mismatch.

python tools/plot_run.py runs/quickstart --output reward.png
python tools/plot_run.py docs/records/quickstart --output docs/figures/quickstart.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PANELS = (
    ("reward (training) and accuracy (held out)", ("reward/mean", "eval/accuracy")),
    ("tokens masked by the trust region", ("dppo/mask_fraction",)),
    ("divergence from the rollout policy (p99)", ("dppo/divergence_p99",)),
    ("|log pi - log mu| before the first update", ("mismatch/abs_log_ratio",)),
)


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's or record's metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; give the folder of a run")
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]


def plot(runs: list[Path], output: Path) -> None:
    """One panel per entry of PANELS, one line per run and metric."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: drawing needs an extra: pip install 'megatron-dppo[plots]'") from error

    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.2 * len(PANELS), 3.4), constrained_layout=True)
    for axis, (title, names) in zip(axes, PANELS, strict=True):
        for run in runs:
            records = read_metrics(run)
            for name in names:
                points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
                label = run.name if len(names) == 1 else f"{run.name}: {name}" if len(runs) > 1 else name
                style = "o-" if name.startswith("eval/") else "-"
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4) if points else None
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("training step")
        axis.grid(alpha=0.3)
        if axis.lines and (len(names) > 1 or len(runs) > 1):
            axis.legend(fontsize=8)
    figure.savefig(output, dpi=110)
    print(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs or records")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG to write (default: %(default)s)")
    arguments = parser.parse_args()
    plot(arguments.runs, arguments.output)


if __name__ == "__main__":
    main()
