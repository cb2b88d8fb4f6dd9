"""From servers that do not hold what was exported to the tensors that are wrong there, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dppo.distributed.collectives import attempted, gather_objects
from megatron_dppo.errors import WeightSyncError
from megatron_dppo.models.hf.export import Bucket
from megatron_dppo.rollout.engine import WeightSource
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums, differs
from megatron_dppo.rollout.sglang.parameter_layout import ServerLayout
from megatron_dppo.rollout.sglang.part_hashes import Part, hash_parts
from megatron_dppo.rollout.sglang.update_watch import UpdateWatch

_MOST_LISTED = 10


@dataclass(frozen=True)
class Mismatch:
    """What a server holds wrongly.

    Attributes:
        url: the server.
        faults: parameter -> what is wrong with it, in words.
        layout: of the server.
        parts: of wrong parameters that are made of several tensors, what the server was asked to hash by itself.
        reported: what it answered: (rank, its hashes); nothing if it knows nothing of parts.
    """

    url: str
    faults: Mapping[str, str]
    layout: ServerLayout
    parts: Sequence[Part] = ()
    reported: Sequence[tuple[int, Mapping[str, str]]] = ()

    def error(self, expected: Mapping[Part, str]) -> WeightSyncError:
        """What is to be raised. ``expected``: hashes of parts, as far as they are known."""
        answers = dict(self.reported)
        faults = dict(self.faults)
        wrong: dict[str, dict[str, None]] = {}
        for part in self.parts:
            if part in expected and answers.get(part.held.rank, {}).get(part.key, expected[part]) != expected[part]:
                wrong.setdefault(part.held.parameter, {})[part.tensor] = None
        faults |= {parameter: differs(list(tensors), parameter) for parameter, tensors in wrong.items()}
        listed = "\n  ".join(list(faults.values())[:_MOST_LISTED])
        return WeightSyncError(
            f"{self.url} does not serve the weights that it was sent; wrong parameters: {len(self.faults)}\n  {listed}"
        )


def explained(
    mismatch: Mismatch,
    kind: ExpectedChecksums | None,
    weights: WeightSource,
    buckets: Sequence[Bucket],
    dtype: torch.dtype,
    watch: UpdateWatch,
) -> WeightSyncError:
    """What is to be raised, down to the tensor where that can be found out. Collective, and the same on all ranks.

    ``kind``: of the server, on ranks that have sent ``buckets`` of ``weights``; None on others.
    """

    def hash_mine() -> dict[Part, str]:
        try:
            return hash_parts_again(mismatch, kind, weights, buckets, dtype, watch.wait_for_ranks)
        except Exception as error:
            if watch.meeting is not None:
                watch.meeting.tell_failure(error)  # to ranks that wait for this one
            raise

    try:
        mine = attempted(hash_mine)
    except Exception:  # that something is wrong is known without
        return mismatch.error({})
    return mismatch.error({part: digest for of_rank in gather_objects(mine) for part, digest in of_rank.items()})


def hash_parts_again(
    mismatch: Mismatch,
    kind: ExpectedChecksums | None,
    weights: WeightSource,
    buckets: Sequence[Bucket],
    dtype: torch.dtype,
    wait: Callable[[dist.Work], None],
) -> dict[Part, str]:
    """What the server should have answered, as far as this rank sends it. Members of buckets call it together.

    ``kind`` is None on ranks that do not send.
    """
    names = {part.tensor for part in mismatch.parts}
    concerned = [bucket for bucket in buckets if any(name in names for name, _ in bucket.tensors)]
    mine: dict[Part, str] = {}
    for index, tensors in weights.fetch(concerned, dtype=dtype, wait=wait):
        assert kind is not None
        sent = zip((name for name, _ in concerned[index].tensors), tensors, strict=True)
        mine |= hash_parts(kind, mismatch.parts, sent)
    return mine
