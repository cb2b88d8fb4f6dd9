"""One line for each thing that was looked at, and how a check is run: on its own, within its time, never with a traceback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_dppo.launch.config import Recipe

State = Literal["ok", "note", "error"]


@dataclass(frozen=True)
class Line:
    """What was found.

    Attributes:
        what: was looked at.
        state: error: a run fails or computes something else; note: it works, but not as well as it could, or was not tried.
        found: in words.
        remedy: what to do; empty if there is nothing to do.
    """

    what: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        recipe: of the run; one of defaults if none was named.
        server_python: interpreter that has SGLang; None: none was named.
        is_named: whether the recipe was named.
    """

    recipe: Recipe
    server_python: str | None
    is_named: bool

    @property
    def root(self) -> Path:
        """The folder of run folders, or the nearest above it that exists."""
        folder = Path(self.recipe.run.root).absolute()
        while not folder.exists():
            folder = folder.parent
        return folder

    @property
    def wants_servers(self) -> bool:
        """Whether the run has SGLang generate."""
        return self.recipe.rollout.engine == "sglang"


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        what: is looked at, in words.
        look: finds it; anything that it raises becomes a line of state error.
        timeout_s: after which it is given up.
        is_long: left out by --quick.
    """

    what: str
    look: Callable[[Subject], Line | Sequence[Line]]
    timeout_s: float = 60.0
    is_long: bool = False

    def run(self, subject: Subject) -> list[Line]:
        """Its lines, at least one."""
        lines: list[Line] = []

        def work() -> None:
            try:
                found = self.look(subject)
                lines.extend([found] if isinstance(found, Line) else found)
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                lines.append(
                    Line(self.what, "error", f"{type(error).__name__}: {first}", "see docs/troubleshooting.md")
                )

        thread = threading.Thread(target=work, name=f"doctor {self.what}", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if thread.is_alive():
            return [
                Line(
                    self.what, "error", f"no answer within {self.timeout_s:g} s", "see what hangs, by py-spy or strace"
                )
            ]
        return lines or [Line(self.what, "error", "the check found nothing to say", "report this")]


def table(lines: Iterable[Line]) -> str:
    """Aligned, with the remedy below every line that has one."""
    rows = list(lines)
    width = max(len(line.what) for line in rows)
    text = []
    for line in rows:
        text.append(f"{line.state:5}  {line.what:{width}}  {line.found}")
        if line.remedy:
            text.append(f"{'':5}  {'':{width}}  -> {line.remedy}")
    return "\n".join(text)
