"""What all ranks tell each other once a step, after generating and scoring, and before anything else that is collective.

Every rank sends one report, whatever happened to it, and reads everybody's: so all of them take the same branch, and know of
every sample what deciding who learns from it takes. Reports travel as bytes over CPU groups; a rank that is not yet there is
waited for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megatron_dppo.distributed.collectives import gather_bytes

_REASONS_KEPT = 20  # of each rank, in words; how many there are is counted
_LONGEST_REASON = 1000


class SampleReport(NamedTuple):
    """What every rank learns of a sample.

    Attributes:
        number: position of its prompt in the step, times samples per prompt, plus its own position among these.
        prompt_tokens: length of the prompt.
        response_tokens: length of the response.
        reward: in [0, 1].
        was_cut: whether it ended at the length limit.
        was_aborted: whether the engine gave it up.
        oldest_weight_version: of its tokens.
        faulty_tokens: whose log-prob is below ``rollout.log_prob_floor``.
    """

    number: int
    prompt_tokens: int
    response_tokens: int
    reward: float
    was_cut: bool
    was_aborted: bool
    oldest_weight_version: int
    faulty_tokens: int = 0


@dataclass(frozen=True)
class Report:
    """What one rank has to say.

    Attributes:
        replica: that it belongs to.
        samples: those that it has: all of its replica on the replica's first rank, none elsewhere.
        failed: how many samples of its replica cannot be used.
        reasons: why, for some of them.
        scoring_failures: responses whose scorer raised, timed out or died (their reward is 0).
        server_loads: url -> (deepest queue seen or None, tokens per second that this replica got), of an engine's servers.
        error: what ended its work, if anything did.
        stop: why the run should stop once the step is done, if it should.
        given_up: why it has stopped waiting for responses, if it has.
        save: whether it is time for a checkpoint, by the clock of this rank.
    """

    replica: int
    samples: tuple[SampleReport, ...] = ()
    failed: int = 0
    reasons: tuple[str, ...] = ()
    scoring_failures: int = 0
    server_loads: Mapping[str, tuple[int | None, float]] = field(default_factory=dict)
    error: str | None = None
    stop: str | None = None
    given_up: str | None = None
    save: bool = False

    def to_bytes(self) -> bytes:
        """A line of JSON, then the samples as float64, which holds each of their numbers exactly."""
        fields = vars(self) | {
            "samples": len(self.samples),
            "reasons": [reason[:_LONGEST_REASON] for reason in self.reasons[:_REASONS_KEPT]],
        }
        rows = torch.tensor([list(sample) for sample in self.samples], dtype=torch.float64, device="cpu")
        return json.dumps(fields).encode() + b"\n" + rows.numpy().tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Report:
        """What ``to_bytes`` made."""
        line, _, rest = data.partition(b"\n")
        fields = json.loads(line)
        rows = (
            torch.frombuffer(bytearray(rest), dtype=torch.float64).view(fields["samples"], -1).tolist() if rest else ()
        )
        samples = tuple(_sample_report(*row) for row in rows)
        loads = {url: (queue, tokens) for url, (queue, tokens) in fields["server_loads"].items()}
        return cls(**fields | {"samples": samples, "reasons": tuple(fields["reasons"]), "server_loads": loads})


def exchange(report: Report) -> list[Report]:
    """Every rank's report, in the order of ranks, on every rank. Collective."""
    return [Report.from_bytes(data) for data in gather_bytes(report.to_bytes())]


def _sample_report(
    number: float,
    prompt: float,
    response: float,
    reward: float,
    was_cut: float,
    was_aborted: float,
    version: float,
    faulty: float,
) -> SampleReport:
    return SampleReport(
        int(number), int(prompt), int(response), reward, bool(was_cut), bool(was_aborted), int(version), int(faulty)
    )
