"""What a policy needs to run forward and backward on the meta device, where tensors have shapes and no values.

A policy asks for a few things that are not there: the current CUDA device, an attention kernel (on the meta device torch
takes the one that keeps whole score matrices), which experts a router chose. Within ``megatron_on_meta`` they have the
answers that a GPU would give, and after it everything is as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

_META = torch.device("meta")
_CPU = torch.device("cpu")


@contextmanager
def megatron_on_meta(expert_load: float = 1.0) -> Iterator[None]:
    """Within: Megatron's models and optimizers can be built and run on meta tensors.

    Args:
        expert_load: tokens that the experts of this rank get, over the mean of all ranks; each of them gets as many.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from megatron_dppo.compat.megatron_on_cpu import enable_megatron_on_cpu

    enable_megatron_on_cpu()
    alltoall = token_dispatcher.MoEAlltoAllTokenDispatcher
    with ExitStack() as undo:
        _replace(undo, torch.cuda, "current_device", lambda: _META)
        _replace(undo, F, "scaled_dot_product_attention", _flash_attention)
        _replace(undo, alltoall, "preprocess", _counting_another_routing(alltoall.preprocess, expert_load))
        allgather = token_dispatcher.MoEAllGatherTokenDispatcher
        _replace(undo, allgather, "dispatch_postprocess", _own_tokens(expert_load))
        for module in (moe_utils, token_dispatcher):
            _replace(undo, module, "permute", _permuting_like(module.permute))
        yield


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """In place of torch's, which chooses by device: the kernel that keeps one number a query beside its result."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: torch.Tensor = attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


def _counting_another_routing(preprocess: Callable[..., Any], expert_load: float) -> Callable[..., Any]:
    """Core's counting of tokens, on counts that have values: the router's choice has none."""

    def counted(self: Any, routing_map: torch.Tensor) -> Any:
        tokens, experts = routing_map.shape
        own = self.local_expert_indices
        routing = even_routing(tokens, experts, self.config.moe_router_topk, range(own[0], own[-1] + 1), expert_load)
        with ExitStack() as undo:
            _replace(undo, torch.cuda, "current_device", lambda: _CPU)  # of counts
            return preprocess(self, routing)

    return counted


def _own_tokens(expert_load: float) -> Callable[..., Any]:
    """What the allgather dispatcher picks from all tokens: as many as a routing with values gives to this rank's experts."""

    def dispatch_postprocess(self: Any, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        tokens, experts = self.routing_map.shape
        own = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        routing = even_routing(tokens, experts, self.config.moe_router_topk, range(own.start, own.stop), expert_load)
        counts = routing[:, own].sum(0)
        self.hidden_shape_before_permute = hidden_states.shape
        self.local_map, self.routing_map = self.routing_map[:, own].contiguous(), None
        chosen, self.local_probs, self.reversed_local_input_permutation_mapping = _permuted(
            hidden_states, probs[:, own].contiguous(), int(counts.sum())
        )
        return chosen, counts, self.local_probs

    return dispatch_postprocess


def even_routing(tokens: int, experts: int, topk: int, own: range, load: float) -> torch.Tensor:
    """[tokens, experts] bool: each token goes to ``topk`` experts, ``own`` ones get ``load`` times what is their share, all
    others the rest, each expert of either kind nearly the same.
    """
    to_own = min(round(load * tokens * topk * len(own) / experts), tokens * min(topk, len(own)))
    to_own = max(to_own, tokens * max(0, topk - (experts - len(own))))
    steps = torch.arange(tokens + 1, device=_CPU)
    before = steps * to_own // max(tokens, 1)  # of the choices before a token, how many are of own experts
    routing = torch.zeros(tokens, experts, dtype=torch.bool, device=_CPU)
    others = torch.tensor([e for e in range(experts) if e not in own], dtype=torch.long, device=_CPU)
    for choice in range(topk):
        mine = choice < before[1:] - before[:-1]
        at = before[:-1] + choice
        rest = steps[:-1] * topk - before[:-1] + choice - (before[1:] - before[:-1])
        expert = torch.where(mine, own.start + at % len(own), others[rest % len(others)] if len(others) else 0)
        routing.scatter_(1, expert[:, None], True)
    return routing


def _permuted(
    tokens: torch.Tensor, probs: torch.Tensor | None, num_out_tokens: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(tokens, their weights, their places) in the order of experts, as many as will come."""
    indices = torch.empty(num_out_tokens, dtype=torch.long, device=tokens.device)
    chosen = None if probs is None else probs.T.contiguous().view(-1).index_select(0, indices)
    return tokens.index_select(0, indices), chosen, indices


def _permuting_like(permute: Callable[..., Any]) -> Callable[..., Any]:
    """In place of core's ``permute``, which asks a mask how many tokens it selects."""
    gives_two_more = "align_size" in inspect.signature(permute).parameters  # newer versions

    def without_values(
        tokens: torch.Tensor,
        routing_map: torch.Tensor,
        probs: torch.Tensor | None = None,
        num_out_tokens: int | None = None,
        **unused: Any,
    ) -> tuple[Any, ...]:
        assert num_out_tokens is not None
        permuted = _permuted(tokens, probs, int(num_out_tokens))
        return (*permuted, None, unused.get("tokens_per_expert")) if gives_two_more else permuted

    return without_values
