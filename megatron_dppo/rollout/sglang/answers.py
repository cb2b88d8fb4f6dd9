"""Reading what a server answered: JSON of any shape may come, and none of it may end in a bare TypeError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dppo.errors import InvalidSampleError, RolloutError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Within, a field that is missing, null or of another type is a RolloutError that names ``what`` and the field."""
    try:
        yield
    except InvalidSampleError:
        raise
    except KeyError as error:
        raise RolloutError(f"{what}: the server's answer has no {error.args[0]!r}; is it SGLang 0.5.23?") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise RolloutError(
            f"{what}: the server's answer is not of the form that SGLang 0.5.23 gives ({type(error).__name__}: {error})"
        ) from error
