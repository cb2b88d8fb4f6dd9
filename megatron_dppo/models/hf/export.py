"""The policy's weights on their way to those who serve it: in buckets, each put together by the one rank that sends it on.

    shards on the ranks of one copy of the policy -> one flat message a bucket and holder -> its sender: whole tensors

Nobody receives what it does not send. Senders lie on every pipeline stage and on several expert-parallel ranks, so that some
put their buckets together while others send. Every rank knows the list of buckets: nothing is announced.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import PretrainedConfig

from megatron_dppo.distributed.collectives import gather_objects
from megatron_dppo.models.hf.names import expert_index, hf_names, hf_shapes, layer_index, parameter_names, to_hf
from megatron_dppo.models.hf.weights import export_hf_weights, padded_shape
from megatron_dppo.models.sharding import join_shards, local_parameters, split_dimension, unwrapped

T = TypeVar("T")


class NamedShape(NamedTuple):
    """A tensor of a Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together.

    Attributes:
        sender: global rank of who sends them on.
        members: global ranks that have a part in it, the sender among them.
        tensors: in the order in which they are sent.
        parameters: of the policy, of which they are made, for whoever puts them together.
    """

    sender: int
    members: tuple[int, ...]
    tensors: tuple[NamedShape, ...]
    parameters: tuple[str, ...] = ()


class Place(NamedTuple):
    """Which shards a rank holds."""

    stage: int
    layers: frozenset[int]
    tensor_rank: int
    expert_tensor_rank: int
    expert_rank: int


class Shard(NamedTuple):
    """One of the parts that make up a parameter, as its holder has it."""

    parameter: str
    holder: int
    shape: tuple[int, ...]


class _Arriving(NamedTuple):
    """A bucket of this rank on its way to it: what each other holder sends, and the sending."""

    number: int
    messages: dict[int, torch.Tensor]
    works: list[dist.Work]


class _Leaving(NamedTuple):
    """This rank's part of a bucket on its way to the sender."""

    number: int
    message: torch.Tensor
    works: list[dist.Work]


class ExportPlan:
    """Who holds what of a policy, and so who sends which bucket. Nothing here needs the ranks themselves."""

    def __init__(self, hf_config: PretrainedConfig, places: Sequence[Place]) -> None:
        """``places``: of every rank, by its number."""
        self._hf_config = hf_config
        self._shards = dict(_all_shards(hf_config, places))
        self._stage_of_rank = [place.stage for place in places]

    def buckets(self, *, dtype: torch.dtype, bucket_bytes: int, max_senders: int) -> list[Bucket]:
        """The whole model, in the order in which buckets are to be sent: senders take turns.

        Args:
            dtype: in which the weights will travel.
            bucket_bytes: of a bucket, unless one parameter alone is larger.
            max_senders: how many ranks send, at most.
        """
        senders = _Senders(self._shards, self._stage_of_rank, max_senders)
        of_sender: dict[int, dict[str, int]] = {}  # sender -> parameter -> bytes
        for name, shards in self._shards.items():
            size = dtype.itemsize * sum(math.prod(shape) for shape in hf_shapes(name, self._hf_config))
            of_sender.setdefault(senders.sender_of([shard.holder for shard in shards], size), {})[name] = size
        rows = [
            [self._bucket(sender, group) for group in group_by_size(list(sizes), list(sizes.values()), bucket_bytes)]
            for sender, sizes in sorted(of_sender.items())
        ]
        return [bucket for turn in zip_longest(*rows) for bucket in turn if bucket is not None]

    def _bucket(self, sender: int, parameters: Sequence[str]) -> Bucket:
        holders = {shard.holder for name in parameters for shard in self._needed(name, sender)}
        tensors = [
            NamedShape(hf, shape)
            for name in parameters
            for hf, shape in zip(hf_names(name), hf_shapes(name, self._hf_config), strict=True)
        ]
        return Bucket(sender, tuple(sorted({sender, *holders})), tuple(tensors), tuple(parameters))

    def shards(self, bucket: Bucket) -> list[Shard]:
        """What its sender puts together, in order."""
        return [shard for name in bucket.parameters for shard in self._needed(name, bucket.sender)]

    def _needed(self, name: str, sender: int) -> list[Shard]:
        """The shards of a parameter; the sender's own copy where every rank of a group has the whole."""
        shards = self._shards[name]
        if split_dimension(name) is not None or len(shards) == 1:
            return shards
        return [next((shard for shard in shards if shard.holder == sender), shards[0])]


class PolicyWeights:
    """A ``WeightSource`` (rollout/engine.py): the live weights of a policy in any layout. Made by all ranks together."""

    def __init__(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = list(model_chunks)
        self._hf_config: PretrainedConfig = unwrapped(model_chunks)[0].hf_config
        self._rank = dist.get_rank()
        names = [name for name, _ in local_parameters(model_chunks)]
        places = gather_objects(
            Place(
                stage=parallel_state.get_pipeline_model_parallel_rank(),
                layers=frozenset(layer for name in names if (layer := layer_index(name)) is not None),
                tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
                expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
                expert_rank=parallel_state.get_expert_model_parallel_rank(),
            )
        )
        self._plan = ExportPlan(self._hf_config, places)
        self._buckets: dict[tuple[torch.dtype, int, int], list[Bucket]] = {}
        self._given_up: list[_Arriving | _Leaving] = []  # begun and not waited for

    def buckets(self, *, dtype: torch.dtype, bucket_bytes: int, max_senders: int) -> list[Bucket]:
        """See ``ExportPlan.buckets``. The same list for every update: making it takes a second for 235B."""
        key = (dtype, bucket_bytes, max_senders)
        if key not in self._buckets:
            self._buckets[key] = self._plan.buckets(dtype=dtype, bucket_bytes=bucket_bytes, max_senders=max_senders)
        return self._buckets[key]

    @torch.no_grad()
    def fetch(
        self, buckets: Sequence[Bucket], *, dtype: torch.dtype, wait: Callable[[dist.Work], None]
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Take part in putting ``buckets`` together. Every member of one has to draw from this to its end.

        While the caller has one bucket, the messages of the next are on their way to it.

        Args:
            buckets: as all other ranks have them.
            dtype: in which the weights travel.
            wait: called to wait for a message, so that the caller can look out for other ranks' failures meanwhile.

        Yields:
            (index, tensors), on the sender of ``buckets[index]``: tensors in ``dtype`` in its order. They may be views of the
            live weights.
        """
        arriving: deque[_Arriving] = deque()
        leaving: deque[_Leaving] = deque()
        try:
            yield from self._fetch(buckets, dtype, wait, arriving, leaving)
        except BaseException:
            # Gloo reads no further from a rank whose message finds its buffer gone, and all ranks are about to tell each
            # other what has failed. On a GPU the memory would be used again while it is still written.
            self._given_up += [*arriving, *leaving]
            raise

    def _fetch(
        self,
        buckets: Sequence[Bucket],
        dtype: torch.dtype,
        wait: Callable[[dist.Work], None],
        arriving: deque[_Arriving],
        leaving: deque[_Leaving],
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """``arriving`` and ``leaving`` hold what has been begun and is not known to have ended."""
        local: dict[str, torch.Tensor] = {}
        for name, parameter in local_parameters(self._chunks):
            local.setdefault(name, parameter.detach())

        def next_whole() -> tuple[int, list[torch.Tensor]]:
            index, messages, works = arriving[0]
            for work in works:
                wait(work)
            arriving.popleft()
            return index, self._put_together(buckets[index], local, messages, dtype)

        # No circle can form: ranks post what belongs to a bucket in the order of buckets, and before they wait for one they
        # have handed on all earlier ones of their own.
        for index, bucket in enumerate(buckets):
            if self._rank not in bucket.members:
                continue
            shards = self._plan.shards(bucket)
            if self._rank == bucket.sender:
                messages = self._empty_messages(shards, dtype, next(iter(local.values())).device)
                arriving.append(_Arriving(index, messages, _posted(dist.irecv, messages)))
                if len(arriving) == 2:
                    yield next_whole()
                continue
            if len(leaving) == 2:
                first = leaving[0]
                while arriving and arriving[0].number < first.number:
                    yield next_whole()
                for work in first.works:
                    wait(work)
                leaving.popleft()
            message = _flat([local[shard.parameter] for shard in shards if shard.holder == self._rank], dtype)
            leaving.append(_Leaving(index, message, _posted(dist.isend, {bucket.sender: message})))
        while arriving:
            yield next_whole()
        for sent in leaving:
            for work in sent.works:
                wait(work)

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor on every rank: see ``export_hf_weights``."""
        return export_hf_weights(self._chunks)

    def _empty_messages(
        self, shards: Sequence[Shard], dtype: torch.dtype, device: torch.device
    ) -> dict[int, torch.Tensor]:
        """For each other rank that holds some of the shards, room for all that it sends."""
        sizes: dict[int, int] = {}
        for shard in shards:
            if shard.holder != self._rank:
                sizes[shard.holder] = sizes.get(shard.holder, 0) + math.prod(shard.shape)
        return {holder: torch.empty(size, dtype=dtype, device=device) for holder, size in sizes.items()}

    def _put_together(
        self,
        bucket: Bucket,
        local: Mapping[str, torch.Tensor],
        messages: Mapping[int, torch.Tensor],
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        start = dict.fromkeys(messages, 0)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in bucket.parameters}
        for name, holder, shape in self._plan.shards(bucket):
            if holder == self._rank:
                parts[name].append(local[name].to(dtype))
                continue
            end = start[holder] + math.prod(shape)
            parts[name].append(messages[holder][start[holder] : end].view(shape))
            start[holder] = end
        return [
            tensor
            for name in bucket.parameters
            for _, tensor in to_hf(name, join_shards(name, parts[name]), self._hf_config)
        ]


class _Senders:
    """Who sends which parameter: ranks spread over the stages, and on each over the ranks that hold something."""

    def __init__(self, shards: Mapping[str, list[Shard]], stage_of_rank: Sequence[int], max_senders: int) -> None:
        stages = max(stage_of_rank) + 1
        groups = min(stages, max_senders)  # of neighbouring stages, each with senders of its own
        self._group_of_rank = [stage * groups // stages for stage in stage_of_rank]
        holders: list[set[int]] = [set() for _ in range(groups)]
        for of_parameter in shards.values():
            for shard in of_parameter:
                holders[self._group_of_rank[shard.holder]].add(shard.holder)
        self._holders = [sorted(of_group) for of_group in holders]
        self._senders = [_spread(of_group, max_senders // groups) for of_group in self._holders]
        self._load: dict[int, int] = {sender: 0 for of_group in self._senders for sender in of_group}

    def sender_of(self, holders: Sequence[int], size: int) -> int:
        """One of the holders if there are senders among them: the one with the least to send so far."""
        group = self._group_of_rank[holders[0]]
        senders = self._senders[group]
        near = senders[self._holders[group].index(holders[0]) * len(senders) // len(self._holders[group])]
        at_hand = [holder for holder in holders if holder in senders] or [near]
        sender = min(at_hand, key=lambda candidate: (self._load[candidate], candidate))
        self._load[sender] += size
        return sender


def group_by_size(items: Sequence[T], sizes: Sequence[int], most: int) -> list[list[T]]:
    """Neighbours together, up to ``most`` in size; one that is larger stays alone."""
    groups: list[list[T]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(item)
        room -= size
    return groups


def _spread(ranks: Sequence[int], number: int) -> list[int]:
    """So many of them, evenly spread, the first among them."""
    number = min(number, len(ranks))
    return [ranks[i * len(ranks) // number] for i in range(number)]


def _all_shards(hf_config: PretrainedConfig, places: Sequence[Place]) -> Iterator[tuple[str, list[Shard]]]:
    """Of every parameter, in export order, the shards of one copy of it: on the lowest ranks that hold them."""
    dense: dict[tuple[int, int], int] = {}  # (stage, tensor rank) -> rank
    experts: dict[tuple[int, int, int], int] = {}  # (stage, expert rank, expert tensor rank) -> rank
    stage_of_layer: dict[int, int] = {}
    for rank, place in enumerate(places):
        dense.setdefault((place.stage, place.tensor_rank), rank)
        experts.setdefault((place.stage, place.expert_rank, place.expert_tensor_rank), rank)
        stage_of_layer |= dict.fromkeys(place.layers, place.stage)
    last_stage = max(place.stage for place in places)
    tensor_ranks = max(place.tensor_rank for place in places) + 1
    expert_ranks = max(place.expert_rank for place in places) + 1
    for name in parameter_names(hf_config):
        layer, expert = layer_index(name), expert_index(name)
        stage = stage_of_layer[layer] if layer is not None else 0 if name.startswith("embedding.") else last_stage
        if expert is None:
            holders = [rank for (of_stage, _), rank in sorted(dense.items()) if of_stage == stage]
        else:
            owner = (stage, expert // (hf_config.num_experts // expert_ranks))
            holders = [rank for (*of_owner, _), rank in sorted(experts.items()) if tuple(of_owner) == owner]
        shape, dimension = list(padded_shape(name, hf_config, tensor_ranks)), split_dimension(name)
        if dimension is not None:
            shape[dimension] //= len(holders)
        yield name, [Shard(name, holder, tuple(shape)) for holder in holders]


def _posted(operation: Callable[..., dist.Work | None], messages: Mapping[int, torch.Tensor]) -> list[dist.Work]:
    """Start to send to, or to receive from, the ranks of ``messages``, all at once."""
    if not messages:
        return []
    return dist.batch_isend_irecv([dist.P2POp(operation, message, rank) for rank, message in messages.items()])


def _flat(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    flat = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=tensors[0].device)
    for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        part.view(tensor.shape).copy_(tensor)
    return flat
