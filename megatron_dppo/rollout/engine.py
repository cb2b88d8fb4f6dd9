"""What the trainer asks of a rollout engine. Two exist: ``embedded`` and ``sglang``; one test suite runs against both.

Every method is called by all ranks of a model replica (the ranks that hold the shards of one copy of the policy), in
the same order, because the engine may use collectives. Replicas (data-parallel ranks) generate for different prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from megatron_dppo.rollout.sample import Prompt, Sample, SamplingParams

NamedTensors = Iterator[tuple[str, torch.Tensor]]


class RolloutEngine(Protocol):
    """Generates samples with the newest weights it was given."""

    @property
    def weight_version(self) -> int:
        """Version of the weights being served: the number of completed ``update_weights`` calls' argument."""
        ...

    @property
    def max_topk_log_probs(self) -> int:
        """The largest K for which the engine can return top-K log-probs."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        """Sample ``samples_per_prompt`` responses for each of this replica's prompts.

        Returns, on every rank of the replica, ``len(prompts) * samples_per_prompt`` samples, those of one prompt next to
        each other and with ``group_id`` equal to the prompt's index in ``prompts``. Raises RolloutError.
        """
        ...

    def update_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """Serve these weights from now on. ``named_tensors`` is a collective iterator of (Hugging Face name, full tensor).

        Returns only when the engine was seen to serve them. Raises WeightSyncError, naming the tensor, if it does not.
        """
        ...

    def health(self) -> None:
        """Raise RolloutError if the engine could not serve a request now."""
        ...

    def close(self) -> None:
        """End every process and group that the engine started. Safe to call twice."""
        ...
