"""The shell commands in the documentation: each block says, in a comment right above it, whether a test runs it.

<!-- run -->                       in a folder where the repository's files are, with nothing else in it
<!-- run: exit 1 -->               and ends with that code
<!-- not run: REASON -->
<!-- not run, of an example: REASON -->     names files that are not there, either
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

_FENCE = re.compile(r"^([ \t]*)(`{3,})[ \t]*(\w*)[^\n]*\n(.*?)^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(
    r"<!-- (?:run(?:: exit (?P<code>\d+))?|(?P<kind>not run|not run, of an example): (?P<reason>\S.*?)) -->\n[ \t]*\Z"
)


@dataclass(frozen=True)
class Fence:
    """One block of a page.

    Attributes:
        place: page and line.
        language: as the block says it.
        text: what is in it.
        mark: what the comment above it says; None: there is none.
    """

    place: str
    language: str
    text: str
    mark: re.Match[str] | None

    @property
    def is_shell(self) -> bool:
        """Whether people are to type it."""
        return self.language in ("bash", "sh", "shell", "console")

    @property
    def is_run(self) -> bool:
        """Whether a test runs it."""
        return self.mark is not None and self.mark["kind"] is None


def pages() -> list[Path]:
    """Every page of the documentation."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fences(text: str, page: str) -> Iterator[Fence]:
    """The blocks of a page, in order."""
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Fence(f"{page}:{line}", found[3], found[4], _MARK.search(text[: found.start()]))


def all_fences() -> list[Fence]:
    """The blocks of all pages."""
    return [f for p in pages() for f in fences(p.read_text(encoding="utf-8"), str(p.relative_to(ROOT)))]
