"""What every rank measures by itself, told to all at the end of a step: who was slowest, who needs the most memory."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from megatron_dppo.distributed.collectives import gather_bytes


@dataclass(frozen=True)
class RankMeasures:
    """Of one rank and one step.

    Attributes:
        seconds: of its phases, and of the work within them that it does without waiting for others; those that it has.
        peak_bytes: most memory held so far: allocated on its GPU, or the resident set of the process on a CPU.
    """

    seconds: Mapping[str, float]
    peak_bytes: int


def measures_of_all(seconds: Mapping[str, float]) -> list[RankMeasures]:
    """This rank's measures and those of all others, in the order of ranks. Collective over all ranks."""
    mine = RankMeasures(dict(seconds), _peak_memory_bytes())
    return [RankMeasures(**json.loads(data)) for data in gather_bytes(json.dumps(asdict(mine)).encode())]


def time_metrics(measures: Sequence[RankMeasures]) -> dict[str, float]:
    """For each phase: the longest time, the mean over the ranks that have it, and which rank was the slowest."""
    metrics: dict[str, float] = {}
    for phase in dict.fromkeys(phase for of_rank in measures for phase in of_rank.seconds):
        times = {rank: of_rank.seconds[phase] for rank, of_rank in enumerate(measures) if phase in of_rank.seconds}
        slowest = max(times, key=times.__getitem__)
        metrics[f"time/{phase}_s"] = times[slowest]
        metrics[f"time/{phase}_mean_s"] = sum(times.values()) / len(times)
        metrics[f"time/{phase}_slowest_rank"] = float(slowest)
    return metrics


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
