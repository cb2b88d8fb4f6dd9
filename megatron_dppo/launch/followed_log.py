"""A log file as it grows, shown elsewhere as well."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import TextIO

_LOOK_EVERY_S = 0.2


class FollowedLog:
    """While it is entered, and once more when it is left, what the file gets is written to a stream."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        """``path``: need not be there yet."""
        self._path = path
        self._stream = stream
        self._position = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="followed-log", daemon=True)

    def __enter__(self) -> FollowedLog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._show()

    def _follow(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self._show()

    def _show(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            new = file.read()
        self._position += len(new)
        self._stream.write(new.decode(errors="replace"))
        self._stream.flush()
