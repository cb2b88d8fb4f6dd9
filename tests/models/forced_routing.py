"""Expert choices that no router made, and a Hugging Face model that computes with them: a reference for routing replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel


def random_choices(tokens: int, layers: int, experts: int, k: int, seed: int) -> torch.Tensor:
    """[tokens, layers, k] int32, k different experts each, in no order; the last token has none (zeros)."""
    scores = torch.rand(tokens, layers, experts, generator=torch.Generator().manual_seed(seed))
    choices = scores.topk(k, dim=-1).indices.int()
    choices[-1] = 0
    return choices


@contextmanager
def hf_forced_to(model: PreTrainedModel, choices_SLk: torch.Tensor) -> Iterator[None]:
    """Within: a Qwen3-MoE model routes the S tokens of one sequence as given (zeros: as it would itself)."""
    with ExitStack() as undo:
        for index, layer in enumerate(model.model.layers):
            gate = layer.mlp.gate
            undo.callback(delattr, gate, "forward")
            gate.forward = _forced_gate(gate, choices_SLk[:, index].long())
        yield


def _forced_gate(gate: torch.nn.Module, choices_Sk: torch.Tensor):
    def forward(hidden_SH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_SE = hidden_SH @ gate.weight.T
        own_Sk = logits_SE.topk(gate.top_k, dim=-1).indices
        experts_Sk = torch.where(choices_Sk.any(dim=-1, keepdim=True), choices_Sk, own_Sk)
        # Qwen3-MoE normalises over the chosen experts: a softmax over their logits alone.
        return logits_SE, logits_SE.gather(-1, experts_Sk).softmax(dim=-1), experts_Sk

    return forward


def put_forced_gradients_in_place_of_weights(
    model: PreTrainedModel, sequences: Sequence[torch.Tensor], choices: Sequence[torch.Tensor]
) -> float:
    """As tests/models/policy_runs.py does without forced routing; returns the mean next-token cross entropy."""
    count, total = sum(len(sequence) - 1 for sequence in sequences), 0.0
    for sequence, choices_SLk in zip(sequences, choices, strict=True):
        with hf_forced_to(model, choices_SLk):
            logits = model(sequence[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum") / count
        loss.backward()
        total += loss.item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return total
