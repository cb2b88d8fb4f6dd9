"""What a section is made of: checks, each of which gives one row or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What a section may ask about the run.

    Attributes:
        device: ``cuda``, or ``cpu``: the same path at tiny sizes. Times of a CPU mean nothing.
        quick: fewer turns and cases, to fit into minutes.
        sanitizers: tools of compute-sanitizer that were asked for.
        scratch: an empty folder for files that nobody keeps.
    """

    device: str
    quick: bool
    sanitizers: tuple[str, ...]
    scratch: Path

    @property
    def on_gpu(self) -> bool:
        """Whether sizes are real ones."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Finding:
    """One row's content.

    Attributes:
        figures: for people.
        passed: None where there is nothing to demand.
        values: the same for programs; SI units, named in the key (``seconds``, ``bytes_per_s``) where there is one.
        name: of the row; None: the check's.
    """

    figures: str
    passed: bool | None = None
    values: Mapping[str, float | int | str] = field(default_factory=dict)
    name: str | None = None


class Skipped(Exception):  # noqa: N818  no error
    """Raised by a check that cannot be made here; the message says why."""


@dataclass(frozen=True)
class Check:
    """``run`` is given ``limit_s`` seconds, after which its process is ended and the row has failed."""

    name: str
    run: Callable[[], Finding | Sequence[Finding]]
    limit_s: float
