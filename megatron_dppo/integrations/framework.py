"""What the adapters share: finding the framework that calls them, and being sure that it is a version whose hook is known."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from megatron_dppo.errors import ConfigError, MissingDependencyError
from megatron_dppo.loss.metrics import MetricSums


def framework_module(name: str) -> ModuleType:
    """A module of the framework; MissingDependencyError where it cannot be imported."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"the adapter for {package} needs {name}, which cannot be imported: {error}"
        ) from error


def require_version(package: str, found: str, recorded: tuple[str, ...]) -> None:
    """Refuse a framework whose hook may pass something else than what was recorded.

    Args:
        package: name of the framework.
        found: the version that is installed; what follows a ``+`` (a commit, a build) is not looked at.
        recorded: those whose calls stand in tests/integrations/records.

    Raises:
        ConfigError: it is another one.
    """
    if found.partition("+")[0] not in recorded:
        raise ConfigError(
            f"{package} {found}: what its hook passes to a loss is known of {', '.join(recorded)} only. "
            "Install that version, or record this one and run its test (docs/integrations.md)"
        )


def require_installed(package: str, recorded: tuple[str, ...]) -> None:
    """``require_version`` of what is installed under that name; MissingDependencyError if nothing is."""
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise MissingDependencyError(f"the adapter for {package} needs {package}, which is not installed") from error
    require_version(package, found, recorded)


def mean_values(metrics: MetricSums) -> dict[str, float]:
    """{name: mean} with the same names every time; 0 for a mean over no tokens. **Waits for the device**, once.

    For frameworks that average numbers over micro-batches: percentiles and maxima would come out as averages, and are not
    here. ``MetricSums`` has them, exactly.
    """
    pairs = zip(metrics.mean_names, metrics.means.tolist(), strict=True)
    return {name: numerator / denominator if denominator > 0 else 0.0 for name, (numerator, denominator) in pairs}
