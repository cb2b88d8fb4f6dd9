"""What went into and came out of every operator of a model during one forward pass, for the policy and for transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from megatron_dppo.launch.doctor.mismatch.definition import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    ROUTER,
)


@dataclass
class Trace:
    """Of one sequence. Keys are (layer, operator); the layer of the embedding is -1, that of the final norm their number.

    Attributes:
        inputs: [S, h].
        outputs: [S, h]; [S, experts] of a router.
    """

    inputs: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    outputs: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)


@contextmanager
def traced_transformers(model: PreTrainedModel) -> Iterator[Trace]:
    """Within: one forward pass of [1, S] tokens fills the trace."""
    trace, body = Trace(), model.model
    with ExitStack() as undo:
        watch = _Watch(trace, undo)
        watch.module(body.embed_tokens, (-1, EMBEDDING))
        for index, layer in enumerate(body.layers):
            watch.module(layer.input_layernorm, (index, INPUT_NORM))
            watch.module(layer.self_attn, (index, ATTENTION))
            watch.module(layer.post_attention_layernorm, (index, MLP_NORM))
            if hasattr(layer.mlp, "gate"):
                watch.router(layer.mlp.gate, (index, ROUTER), _of_transformers)
                watch.module(layer.mlp, (index, EXPERTS))
            else:
                watch.module(layer.mlp, (index, MLP))
        watch.module(body.norm, (len(body.layers), FINAL_NORM))
        yield trace


@contextmanager
def traced_policy(model: Any) -> Iterator[Trace]:
    """Within: one forward pass of [1, S] tokens fills the trace. ``model``: the only chunk of the policy, on one rank.

    Where Transformer Engine computes a norm within the linear layer after it, there is no norm to watch: the operator after
    it has the norm's input (operators.py knows).
    """
    trace, body = Trace(), model.decoder
    with ExitStack() as undo:
        watch = _Watch(trace, undo)
        watch.module(model.embedding.word_embeddings, (-1, EMBEDDING))
        for index, layer in enumerate(body.layers):
            for module, name in ((layer.input_layernorm, INPUT_NORM), (layer.pre_mlp_layernorm, MLP_NORM)):
                if any(True for _ in module.parameters()):
                    watch.module(module, (index, name))
            watch.module(layer.self_attention, (index, ATTENTION))
            if hasattr(layer.mlp, "router"):
                watch.router(layer.mlp.router, (index, ROUTER), _of_core)
                watch.module(layer.mlp, (index, EXPERTS))
            else:
                watch.module(layer.mlp, (index, MLP))
        watch.module(body.final_layernorm, (len(body.layers), FINAL_NORM))
        yield trace


class _Watch:
    """Puts hooks on modules, and takes them off again."""

    def __init__(self, trace: Trace, undo: ExitStack) -> None:
        self._trace, self._undo = trace, undo

    def module(self, module: torch.nn.Module, key: tuple[int, str]) -> None:
        def keep(_: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            self._keep_input(key, args, named)
            self._trace.outputs[key] = _flat(output[0] if isinstance(output, tuple) else output)

        self._undo.callback(module.register_forward_hook(keep, with_kwargs=True).remove)

    def router(self, module: torch.nn.Module, key: tuple[int, str], weights: Any) -> None:
        def keep(_: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            self._keep_input(key, args, named)
            self._trace.outputs[key] = weights(output).detach()

        self._undo.callback(module.register_forward_hook(keep, with_kwargs=True).remove)

    def _keep_input(self, key: tuple[int, str], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = args[0] if args else next(value for value in named.values() if isinstance(value, torch.Tensor))
        self._trace.inputs[key] = _flat(given)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[S, 1, h] or [1, S, h] -> [S, h]; token ids [1, S] -> [S]. A copy: some modules write into their input."""
    return (x.flatten() if not x.is_floating_point() else x.reshape(-1, x.shape[-1])).detach().clone()


def _of_core(output: Any) -> torch.Tensor:
    probabilities, chosen = output[:2]
    return torch.where(chosen.bool(), probabilities, torch.zeros_like(probabilities)).reshape(
        -1, probabilities.shape[-1]
    )


def _of_transformers(output: Any) -> torch.Tensor:
    logits, weights, chosen = output
    return torch.zeros_like(logits).scatter(-1, chosen, weights.to(logits.dtype))
