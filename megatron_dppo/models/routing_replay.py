"""Expert choices of an MoE policy: recorded where tokens are sampled, replayed where the policy is updated.

    replay = RoutingReplay(model_chunks)
    with replay.forward_pass(chunk, micro_batch.routed_experts):
        output = chunk(tokens, position_ids, None)

Two engines that compute the same logits with other roundings choose other experts for some tokens, and one other expert
changes a log-probability far more than rounding does. With replay ("R3", arXiv 2510.11370) the update computes with the
experts that the rollout computed with. The weights of these experts are still computed, and differentiated, by the present
router.

Core's routers ask an object, ``router.router_replay``, for the experts of every token. Core's own class for it finds the
choices of a recomputed forward by counting on a process-wide list of routers; here they hang on the autograd graph of the
forward pass that they were given for, so the order of forward and backward passes does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from torch.autograd import Variable

from megatron_dppo.models.expert_choices import is_invalid_choice

# (scores [tokens, experts], k, num_groups, group_topk) -> (scores of the chosen experts, experts), both [tokens, k]
ComputeTopk = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RoutingReplay:
    """Replays recorded expert choices in forward passes of an MoE policy, and in what a backward pass recomputes of them.

    Nothing special is needed when the policy is built. Without ``forward_pass`` the routers choose for themselves.

    Attributes:
        layers: this rank's, by their indices in the whole policy, in the order in which choices are given for them.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """``model_chunks``: this rank's part of the policy, wrapped or not. ValueError if it cannot replay."""
        self._models: list[GPTModel] = list(unwrap_model(list(model_chunks)))
        self._config = self._models[0].config
        self._choosers = [
            [_ReplayingChooser(router, layer) for layer, router in moe_routers(model)] for model in self._models
        ]
        self.layers = tuple(chooser.layer for choosers in self._choosers for chooser in choosers)

    @contextmanager
    def forward_pass(self, chunk: torch.nn.Module, routed_experts_BSLk: torch.Tensor) -> Iterator[None]:
        """Around one forward pass of one chunk: its tokens go to the given experts, also if the backward computes it again.

        Args:
            chunk: one of the policy's, wrapped or not.
            routed_experts_BSLk: [B, S, layers of this rank, experts per token] integers, for the tokens [B, S] of the
                forward pass; the layers are ``layers``. Where all are 0 nothing was recorded (padding, a response's last
                token) and the router chooses.

        Raises:
            ValueError: the choices do not fit the policy or the tokens. Values are looked at on the CPU only; where they
                come from a rollout engine, ``Sample.check`` has done so.
            RuntimeError: a router did not ask for its choices, so the forward pass was not the one that was meant.
        """
        model = unwrap_model(chunk)
        index = next((i for i, own in enumerate(self._models) if own is model), None)
        if index is None:
            raise ValueError("forward_pass was given a model chunk that this RoutingReplay was not made for")
        choosers = self._choosers[index]
        given = dict(zip(choosers, self._choices(choosers, routed_experts_BSLk), strict=True))

        def replay_again(_: torch.Tensor) -> None:
            # The first that a backward pass of this chunk does; what it recomputes asks its routers anew.
            _replay(given, count=False)
            Variable._execution_engine.queue_callback(lambda: _stop(choosers))

        def watch_for_backward(_: torch.nn.Module, __: Any, hidden: torch.Tensor) -> None:
            if hidden.requires_grad:
                hidden.register_hook(replay_again)

        handle = model.decoder.register_forward_hook(watch_for_backward)
        _replay(given, count=True)
        try:
            yield
            for chooser in choosers:
                chooser.check_asked_once()
        finally:
            handle.remove()
            _stop(choosers)

    def replayed_differently(self) -> float:
        """Of all replayed (token, layer) pairs since the last call: the share for which the router would have chosen others.

        Collective over all ranks. 0 if nothing was replayed.
        """
        device = next(self._models[0].parameters()).device
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        for chooser in (chooser for choosers in self._choosers for chooser in choosers):
            counts += chooser.take_counts(device)
        dist.all_reduce(counts)
        different, replayed = counts.tolist()
        return different / replayed if replayed else 0.0

    def _choices(self, choosers: Sequence[_ReplayingChooser], routed_experts_BSLk: torch.Tensor) -> list[torch.Tensor]:
        """This rank's [tokens, k] choices for each chooser, in the order in which its router sees the tokens."""
        config = self._config
        expected = (len(self.layers), config.moe_router_topk)
        if routed_experts_BSLk.dim() != 4 or tuple(routed_experts_BSLk.shape[2:]) != expected:
            raise ValueError(
                f"routed_experts has shape {tuple(routed_experts_BSLk.shape)}, expected [B, S, {expected[0]} layers of "
                f"this rank, {expected[1]} experts per token]: was it recorded with another model?"
            )
        own_BSLk = routed_experts_BSLk[:, :, [self.layers.index(chooser.layer) for chooser in choosers]]
        if not own_BSLk.is_cuda:  # to look at values on a GPU is to wait for it
            _check_choices(own_BSLk, [chooser.layer for chooser in choosers], config.num_moe_experts)
        if config.sequence_parallel:
            own_BSLk = _sequence_parallel_part(own_BSLk)
        own_LSBk = own_BSLk.permute(2, 1, 0, 3).to(next(self._models[0].parameters()).device)
        return list(own_LSBk.flatten(1, 2).long())


class RoutingRecorder:
    """Records which experts the routers choose while ``recording()``. Every rank must compute all tokens of its chunks."""

    def __init__(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """``model_chunks``: this rank's part of the policy, wrapped or not. ValueError if it cannot record."""
        routers = [found for model in unwrap_model(list(model_chunks)) for found in moe_routers(model)]
        self.layers = [layer for layer, _ in routers]  # indices of this rank's layers in the whole policy
        self._routers = [router for _, router in routers]
        self._choosers = [_RecordingChooser() for _ in routers]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within: the routers' choices are kept until ``take``. Afterwards the routers are as before."""
        before = [router.router_replay for router in self._routers]
        for router, chooser in zip(self._routers, self._choosers, strict=True):
            router.router_replay = chooser
        try:
            yield
        finally:
            for router, chooser, previous in zip(self._routers, self._choosers, before, strict=True):
                router.router_replay = previous
                chooser.experts = None

    def take(self, batch: int) -> torch.Tensor:
        """[B, S, layers of this rank, k] int32: the choices for the S tokens per row of the last forward pass."""
        per_layer = []
        for layer, chooser in zip(self.layers, self._choosers, strict=True):
            if chooser.experts is None:
                raise RuntimeError(f"the router of layer {layer} did not choose experts in the last forward pass")
            per_layer.append(chooser.experts.unflatten(0, (-1, batch)))  # tokens come sequence-first: [s * b, k]
            chooser.experts = None
        return torch.stack(per_layer, dim=2).transpose(0, 1).int()


def moe_routers(model: GPTModel) -> list[tuple[int, TopKRouter]]:
    """(index of the layer in the whole policy, its router) of every MoE layer in this chunk.

    Raises ValueError if the experts of a token cannot be recorded or replayed in this model.
    """
    config = model.config
    if config.num_moe_experts is None:
        raise ValueError("expert choices can be recorded and replayed in MoE policies only; this one is dense")
    if config.moe_router_fusion:
        raise ValueError("moe_router_fusion=True hides the choice of experts inside of a fused kernel: set it to False")
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise ValueError("moe_router_load_balancing_type='sinkhorn' chooses no top-k experts that could be replayed")
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    for router in routers:
        if not hasattr(router, "router_replay"):
            raise ValueError("this megatron-core's routers cannot replay expert choices: it has to be 0.16 or newer")
    return [(router.layer_number - 1, router) for router in routers]


class _ReplayingChooser:
    """Stands in a router's ``router_replay`` for good; chooses as the router would while there is nothing to replay."""

    def __init__(self, router: TopKRouter, layer: int) -> None:
        self.layer = layer
        self._experts: torch.Tensor | None = None  # [tokens, k] int64; rows of zeros: not recorded
        self._counting = False
        self._asked = 0
        self._counts: torch.Tensor | None = None  # tokens whose choices differ, tokens replayed
        router.router_replay = self

    def replay(self, experts: torch.Tensor, count: bool) -> None:
        self._experts, self._counting, self._asked = experts, count, 0

    def stop(self) -> None:
        self._experts = None

    def check_asked_once(self) -> None:
        if self._asked != 1:
            raise RuntimeError(
                f"the router of layer {self.layer} asked for its replayed experts {self._asked} times during forward_pass, "
                "which has to hold one forward pass of the chunk (CUDA graphs and fused routing bypass the replay)"
            )

    def take_counts(self, device: torch.device) -> torch.Tensor:
        counts, self._counts = self._counts, None
        return torch.zeros(2, dtype=torch.float64, device=device) if counts is None else counts

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: ComputeTopk = torch.topk,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What core's routing calls: scores [tokens, experts] -> ([tokens, k] scores, [tokens, k] experts)."""
        if self._experts is None:
            return default_compute_topk(scores, topk, num_groups, group_topk)
        self._asked += 1
        if self._experts.shape[0] != scores.shape[0]:
            raise ValueError(
                f"layer {self.layer} routes {scores.shape[0]} tokens, but experts for {self._experts.shape[0]} were given: "
                "routed_experts must cover exactly the tokens of this forward pass"
            )
        with torch.no_grad():
            own = default_compute_topk(scores, topk, num_groups, group_topk)[1]
        recorded = _is_recorded(self._experts)
        if self._counting:
            self._count(own, recorded)
        experts = torch.where(recorded[:, None], self._experts, own)
        return scores.gather(1, experts), experts

    def _count(self, own: torch.Tensor, recorded: torch.Tensor) -> None:
        assert self._experts is not None
        different = (own.sort(dim=1).values != self._experts.sort(dim=1).values).any(dim=1) & recorded
        counts = torch.stack([different.sum(), recorded.sum()]).double()
        self._counts = counts if self._counts is None else self._counts + counts


class _RecordingChooser:
    """Chooses as the router would and keeps the choice."""

    def __init__(self) -> None:
        self.experts: torch.Tensor | None = None  # [tokens, k]

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: ComputeTopk = torch.topk,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What core's routing calls, see ``_ReplayingChooser``."""
        chosen_scores, self.experts = default_compute_topk(scores, topk, num_groups, group_topk)
        return chosen_scores, self.experts


def _replay(given: dict[_ReplayingChooser, torch.Tensor], count: bool) -> None:
    for chooser, experts in given.items():
        chooser.replay(experts, count)


def _stop(choosers: Sequence[_ReplayingChooser]) -> None:
    for chooser in choosers:
        chooser.stop()


def _is_recorded(experts: torch.Tensor) -> torch.Tensor:
    """[..., k] -> [...] bool. k > 1 experts of a token differ, so all zeros are no choice; with k = 1 they are one."""
    return experts.any(dim=-1) if experts.shape[-1] > 1 else torch.ones_like(experts[..., 0], dtype=torch.bool)


def _check_choices(experts_BSLk: torch.Tensor, layers: Sequence[int], num_experts: int) -> None:
    """Raise ValueError, naming the position, for a recorded choice that is not k different experts."""
    bad_BSL = is_invalid_choice(experts_BSLk, num_experts) & _is_recorded(experts_BSLk)
    if bad_BSL.any():
        row, position, index = (int(i) for i in bad_BSL.nonzero()[0])
        raise ValueError(
            f"routed_experts of row {row}, token {position}, layer {layers[index]} is "
            f"{experts_BSLk[row, position, index].tolist()}: expected {experts_BSLk.shape[-1]} different experts of "
            f"{num_experts}. Is the rollout engine serving this policy?"
        )


def _sequence_parallel_part(own_BSLk: torch.Tensor) -> torch.Tensor:
    """This tensor-parallel rank's consecutive part of the tokens."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if own_BSLk.shape[1] % size:
        raise ValueError(f"{own_BSLk.shape[1]} tokens per row cannot be split over {size} sequence-parallel ranks")
    return own_BSLk.chunk(size, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
