"""The sides that compute log-probs of the same tokens, and how policy and transformers are run for them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from megatron_dppo.launch.doctor.mismatch.definition import Definition
from megatron_dppo.launch.doctor.mismatch.trace import Trace, traced_policy, traced_transformers
from megatron_dppo.models.policy_head import PolicyHead, hidden_states_only
from megatron_dppo.models.routing_replay import RoutingReplay
from megatron_dppo.ops.fp32_linear import fp32_linear
from megatron_dppo.ops.fp32_product import is_16_bit

SERVER, POLICY, TRANSFORMERS = "server", "policy", "transformers"


@dataclass(frozen=True)
class Tokens:
    """A prompt and the response that is compared.

    Attributes:
        ids: all of them.
        response: how many of the last ones are compared.
        experts: [len(ids) - 1, layers, k] int32 that a server chose, or None.
    """

    ids: tuple[int, ...]
    response: int
    experts: torch.Tensor | None = None

    @property
    def fed(self) -> torch.Tensor:
        """[1, S]: what a model is given."""
        return torch.tensor([self.ids[:-1]])

    @property
    def targets(self) -> torch.Tensor:
        """[response]."""
        return torch.tensor(self.ids[-self.response :])


@dataclass(frozen=True)
class Side:
    """What one side computed, all sequences one after the other, on the CPU.

    Attributes:
        name: whose.
        log_probs: [n] float64 of the tokens, as the side reports them.
        hidden: [n, h] after the final norm; None: it does not return them.
    """

    name: str
    log_probs: torch.Tensor
    hidden: torch.Tensor | None


@torch.no_grad()
def policy_side(model: Any, sequences: Sequence[Tokens], *, replay: bool = False) -> tuple[Side, list[Trace]]:
    """Of the policy's only chunk on one rank; ``replay``: with the experts of the sequences."""
    head, device = PolicyHead(model), next(model.parameters()).device
    routing = RoutingReplay([model]) if replay else None
    log_probs, hidden, traces = [], [], []
    for tokens in sequences:
        fed = tokens.fed.to(device)
        positions = torch.arange(fed.shape[1], device=device)
        replayed: AbstractContextManager[object] = nullcontext()
        if routing is not None and tokens.experts is not None:
            replayed = routing.forward_pass(model, tokens.experts[None])
        with hidden_states_only(model), traced_policy(model) as trace, replayed:
            output = model(fed, positions[None], None)
        rows = head.response_hidden(output, positions[-tokens.response :], (1, fed.shape[1]))
        logits = head.logits(rows)[:, : model.hf_config.vocab_size]
        log_probs.append(_log_probs(logits, tokens.targets))
        hidden.append(rows.cpu())
        traces.append(trace)
    return Side(POLICY, torch.cat(log_probs), torch.cat(hidden)), traces


@torch.no_grad()
def transformers_side(model: PreTrainedModel, sequences: Sequence[Tokens]) -> tuple[Side, list[Trace]]:
    """With fp32 logits, as the policy's default is: transformers' own rounding of logits is nobody's concern here."""
    weight = model.get_output_embeddings().weight
    log_probs, hidden, traces = [], [], []
    for tokens in sequences:
        with traced_transformers(model) as trace:
            output = model.model(tokens.fed.to(weight.device)).last_hidden_state
        rows = output[0, -tokens.response :]
        logits = fp32_linear(rows, weight) if is_16_bit(weight) else rows @ weight.T
        log_probs.append(_log_probs(logits, tokens.targets))
        hidden.append(rows.cpu())
        traces.append(trace)
    return Side(TRANSFORMERS, torch.cat(log_probs), torch.cat(hidden)), traces


@torch.no_grad()
def defined_hidden(definition: Definition, sequences: Sequence[Tokens]) -> torch.Tensor:
    """[n, h]: by the definition, in its dtype."""
    return torch.cat([definition.hidden(tokens.fed[0])[-tokens.response :].cpu() for tokens in sequences])


@torch.no_grad()
def exact_log_probs(definition: Definition, hidden: torch.Tensor, sequences: Sequence[Tokens]) -> torch.Tensor:
    """[n] float64: what these hidden states give with the folder's output layer."""
    targets = torch.cat([tokens.targets for tokens in sequences])
    return _log_probs(definition.logits(hidden), targets)


@torch.no_grad()
def sampled(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Tokens]:
    """Responses drawn by transformers, where there is no server."""
    generator = torch.Generator().manual_seed(0)
    device, sequences = next(model.parameters()).device, []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(new_tokens):
            last = model(torch.tensor([ids], device=device)).logits[0, -1].float().cpu()
            ids.append(int(torch.multinomial(last.softmax(-1), 1, generator=generator)))
        sequences.append(Tokens(tuple(ids), new_tokens))
    return sequences


def _log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1).gather(-1, targets.to(logits.device)[:, None])[:, 0].cpu()
