"""What a person sees on a terminal while a run goes on: progress, phases with the time that they have left, numbers, servers.

Drawn from what has been told to it; it asks nothing of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_dppo.training.metrics.sink import Metrics

# What a person watches while a run goes on: label, metric, format.
HEADLINE = (
    ("reward", "reward/mean", "{:.3f}"),
    ("held-out", "eval/accuracy", "{:.3f}"),
    ("masked", "dppo/mask_fraction", "{:.2%}"),
    ("mismatch KL", "mismatch/kl_k3", "{:.1e}"),
    ("grad norm", "grad_norm", "{:.2f}"),
    ("tok/s", "throughput/tokens_per_s", "{:.0f}"),
)
_NUMBERS = (
    *HEADLINE,
    ("entropy", "entropy", "{:.3f} nats"),
    ("length", "rollout/length_mean", "{:.0f} tokens"),
    ("cut", "rollout/cut_fraction", "{:.1%}"),
    ("largest token", "dppo/largest_token_share", "{:.1%}"),
)
_SERVERS = (
    ("servers", "rollout/servers", "{:.0f}"),
    ("fastest", "rollout/server_tokens_per_s_max", "{:.0f} tok/s"),
    ("slowest", "rollout/server_tokens_per_s_min", "{:.0f} tok/s"),
    ("longest queue", "rollout/server_queue_depth_max", "{:.0f}"),
    ("slowest is", "rollout/slowest_server", "{}"),
)
_REFRESHES_PER_S = 2


class LiveDisplay:
    """Redraws itself from a thread of its own between ``start`` and ``stop``."""

    def __init__(self, console: Console, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = total_steps
        self._first = self._step = 0
        self._began = self._phase_began = clock()
        self._phase = "starting"
        self._took: dict[str, float] = {}
        self._metrics: dict[str, float | str] = {}
        self._live = Live(
            console=console, get_renderable=self.render, refresh_per_second=_REFRESHES_PER_S, transient=False
        )

    def start(self, step: int) -> None:
        """Begin after ``step`` completed steps."""
        self._first = self._step = step
        self._began = self._clock()
        self._live.start()

    def phase(self, name: str) -> None:
        """What the run does from now on."""
        now = self._clock()
        self._took[self._phase] = now - self._phase_began
        self._phase, self._phase_began = name, now

    def record(self, step: int, metrics: Metrics) -> None:
        """The numbers of a step that is done; those that it lacks stay as they were."""
        self._step = step
        self._metrics.update(metrics)

    def stop(self) -> None:
        """Leave the last picture standing."""
        self._live.stop()

    def render(self) -> RenderableType:
        """The picture as of now."""
        parts: list[RenderableType] = [self._progress(), self._phases(), self._pairs(_NUMBERS)]
        if any(metric in self._metrics for _, metric, _ in _SERVERS):
            parts.append(self._pairs(_SERVERS))
        return Panel(Group(*parts), title="training", title_align="left")

    def _progress(self) -> RenderableType:
        elapsed, done = self._clock() - self._began, self._step - self._first
        left = elapsed / done * (self._total - self._step) if done > 0 else None
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(width=16)
        grid.add_column(ratio=1)
        grid.add_column(justify="right")
        text = f"{duration(elapsed)} so far, {'?' if left is None else duration(left)} left"
        grid.add_row(f"step {self._step}/{self._total}", ProgressBar(self._total, self._step), text)
        return grid

    def _phases(self) -> RenderableType:
        """The present one with how much longer it takes, if it takes as long as the last time; the others' last times."""
        elapsed = self._clock() - self._phase_began
        text = Text(f"{self._phase.replace('_', ' ')} {duration(elapsed)}", style="bold")
        if (before := self._took.get(self._phase)) is not None:
            text.append(f" (about {duration(max(before - elapsed, 0.0))} left)", style="not bold")
        others = [
            f"{name.replace('_', ' ')} {duration(seconds)}"
            for name, seconds in self._took.items()
            if name not in (self._phase, "starting")
        ]
        return text.append("   last: " + ", ".join(others), style="not bold dim") if others else text

    def _pairs(self, wanted: tuple[tuple[str, str, str], ...]) -> RenderableType:
        grid = Table.grid(padding=(0, 3))
        known = [(label, form.format(self._metrics[name])) for label, name, form in wanted if name in self._metrics]
        for at in range(0, len(known), 5):
            grid.add_row(*(Text.assemble((f"{label} ", "dim"), value) for label, value in known[at : at + 5]))
        return grid


def duration(seconds: float) -> str:
    """As a person says it: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
