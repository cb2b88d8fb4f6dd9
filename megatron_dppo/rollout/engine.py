"""What the trainer asks of a rollout engine. Two exist: ``embedded`` and ``sglang``; one test suite runs against both.

Every method is called by all ranks of a model replica (the ranks that hold the shards of one copy of the policy), in
the same order, because the engine may use collectives. Replicas (data-parallel ranks) generate for different prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_dppo.models.hf.export import Bucket
from megatron_dppo.rollout.sample import FailedSample, Prompt, Sample, SamplingParams


class WeightSource(Protocol):
    """Weights that an engine is to serve. ``models/hf/export.py`` has those of a policy, ``whole_weights.py`` any others."""

    def buckets(self, *, dtype: torch.dtype, bucket_bytes: int, max_senders: int) -> Sequence[Bucket]:
        """All tensors, in buckets of about this size when they are in ``dtype``, sent by at most so many ranks.

        The same on every rank.
        """
        ...

    def fetch(
        self, buckets: Sequence[Bucket], *, dtype: torch.dtype, wait: Callable[[dist.Work], None]
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """(index, tensors) of each bucket that this rank sends, in order. Every member of a bucket draws it to its end.

        ``wait`` is called to wait for other ranks.
        """
        ...

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (Hugging Face name, tensor), on every rank, for an engine that lives on the trainer's ranks.

        Collective: all ranks draw it to its end.
        """
        ...


@dataclass(frozen=True)
class ServerLoad:
    """One server during one ``generate`` call of one replica.

    Attributes:
        queue_depth_max: most requests seen waiting on the server, of all replicas together: replicas see the same queue, so
            their numbers are not to be added. None: the server does not report it, or was asked for nothing.
        tokens_per_s: tokens of the responses that this replica got from the server, per second of the call. The sum over
            the replicas that generate at the same time is what the server did.
    """

    queue_depth_max: int | None
    tokens_per_s: float


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

    @property
    def ranks_generate_together(self) -> bool:
        """Whether ranks wait for each other within ``generate``: one that fails there by itself leaves the others waiting."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample | FailedSample]:
        """Sample ``samples_per_prompt`` responses for each of this replica's prompts.

        Returns, on the replica's first rank, ``len(prompts) * samples_per_prompt`` samples, those of one prompt next to each
        other and with ``group_id`` equal to the prompt's index in ``prompts``; other ranks may get less. What goes wrong with
        one response is a FailedSample in its place. Raises RolloutError, maybe on some ranks only, if nothing can be had.
        """
        ...

    def server_loads(self) -> Mapping[str, ServerLoad]:
        """By url, the load of every server during this replica's last ``generate``, on the replica's first rank. Empty
        elsewhere, before, and where the engine has no servers.
        """
        ...

    def update_weights(self, weights: WeightSource, version: int) -> None:
        """Serve these weights from now on. Called by all ranks of the trainer together.

        Returns only when the engine was seen to serve them. Raises WeightSyncError, naming the tensor, if it does not.
        """
        ...

    def health(self) -> None:
        """Raise RolloutError if the engine could not serve a request now."""
        ...

    def close(self) -> None:
        """End every process and group that the engine started. Safe to call twice."""
        ...


def check_request(
    prompts: Sequence[Prompt], sampling: SamplingParams, *, vocab_size: int, max_length: int | None = None
) -> None:
    """Raise ValueError, naming the prompt, for what must not be asked of an engine. (A server may end over a wrong id.)

    ``max_length``: most tokens of prompt and response, if there is a limit that the engine does not report itself.
    """
    if sampling.topk_log_probs > vocab_size:
        raise ValueError(
            f"SamplingParams.topk_log_probs={sampling.topk_log_probs} exceeds the vocabulary of {vocab_size}"
        )
    for prompt in prompts:
        if not prompt.token_ids:
            raise ValueError(f"prompt {prompt.prompt_id} is empty")
        if not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < vocab_size:
            position = next(i for i, token in enumerate(prompt.token_ids) if not 0 <= token < vocab_size)
            raise ValueError(
                f"prompt {prompt.prompt_id}: token {position} has id {prompt.token_ids[position]}, outside the vocabulary of "
                f"{vocab_size}; was it tokenised with another model's tokenizer?"
            )
        length = len(prompt.token_ids) + sampling.max_new_tokens
        if max_length is not None and length > max_length:
            raise ValueError(
                f"prompt {prompt.prompt_id} with max_new_tokens={sampling.max_new_tokens} needs {length} positions, the "
                f"policy has {max_length}"
            )
