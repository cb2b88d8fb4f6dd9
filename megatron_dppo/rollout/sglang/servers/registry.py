"""A folder in which servers register themselves, so that a trainer finds them wherever they run.

One small JSON file a server, on a file system that all hosts share. A file appears when its server is ready and goes when it
ends; the file of a host that died stays, and its server is one that does not answer.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dppo.errors import RolloutError
from megatron_dppo.rollout.sglang.servers.software import Software
from megatron_dppo.rollout.sglang.servers.source import Found

_SUFFIX = ".server.json"


@dataclass(frozen=True)
class Registration:
    """What a server says of itself.

    Attributes:
        url: where it is reached.
        host: where it runs, for people.
        pid: of the process that runs it there, for people.
        software: that it runs on; None if its interpreter does not say.
    """

    url: str
    host: str
    pid: int
    software: Software | None = None


class Registry:
    """The folder, as those who serve see it."""

    def __init__(self, folder: Path) -> None:
        """The folder is made if it is not there."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def enter(self, name: str, registration: Registration) -> None:
        """Register under a name, in place of what was registered under it. Readers see all of it or nothing."""
        partial = self._folder / f".{name}.{os.getpid()}"
        partial.write_text(json.dumps(asdict(registration)) + "\n", encoding="utf-8")
        os.replace(partial, self._path(name))

    def leave(self, name: str) -> None:
        """Nothing happens if nobody is registered under the name."""
        self._path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Nobody is registered any more."""
        for file in self._folder.glob(f"*{_SUFFIX}"):
            file.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"


def read_registry(path: Path) -> list[str]:
    """Addresses, in the order of their names: of a registry's servers, or of the lines of a text file.

    Empty if there is nothing at ``path`` yet. Raises RolloutError, naming the place, for what is no registration and no
    address.
    """
    return list(_read(path))


def _read(path: Path) -> dict[str, Software | None]:
    """Address -> what the server runs on, as far as it has said so."""
    if path.is_file():
        lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
        return {_checked(line, path): None for line in lines if line}
    found: dict[str, Software | None] = {}
    for file in sorted(path.glob(f"*{_SUFFIX}")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            software = said.get("software")
            found.setdefault(_checked(said["url"], file), Software(**software) if software else None)
        except FileNotFoundError:  # it has left since it was listed
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RolloutError(f"{file} is no registration of a server ({error}): remove it") from error
    return found


def _checked(url: object, place: Path) -> str:
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise RolloutError(f"{place}: {url!r} does not start with http:// or https://")
    return url.rstrip("/")


class RegisteredServers:
    """A ``ServerSource``: whoever has registered."""

    def __init__(self, path: Path, expected: int) -> None:
        """``path``: of the registry, or of a file with one address a line. ``expected``: servers at the start."""
        self._path = path
        self._expected = expected

    @property
    def expected(self) -> int:
        """As it was given; more are welcome."""
        return self._expected

    def start(self) -> None:
        """They start themselves."""

    def find(self) -> Found:
        """See ``ServerSource.find``."""
        urls = tuple(read_registry(self._path))
        missing = self._expected - len(urls)
        return Found(urls, awaited=(f"{missing} more to register in {self._path}",) if missing > 0 else ())

    def end(self, url: str) -> None:
        """They are not this process's to end."""

    def software_of(self, url: str) -> Software | None:
        """As it has registered."""
        return _read(self._path).get(url)

    def close(self) -> None:
        """They are not this process's to end."""
