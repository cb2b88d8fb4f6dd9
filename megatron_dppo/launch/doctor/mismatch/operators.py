"""Each operator of one side beside its definition in float64, on that side's own input: no error is carried on.

How much rounding explains is measured: the definition computed in the model's dtype rounds after every operation, on the
same input, and is off by some e. Another right implementation rounds at some of these places, or sums in another order; its
error is independent and of the same size, and over a whole matrix the root mean square varies little. ``_ROOM`` times e, and
the last rounding of the result, is the threshold. What is wrong by less cannot be told from rounding in that dtype: fp32 sees
more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_dppo.launch.doctor.mismatch.definition import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    ROUTER,
    Definition,
)
from megatron_dppo.launch.doctor.mismatch.trace import Trace

_ROOM = 4.0
_BEFORE = {ATTENTION: INPUT_NORM, MLP: MLP_NORM, ROUTER: MLP_NORM}  # whose norm may be within them


@dataclass(frozen=True)
class OperatorError:
    """One operator of one side.

    Attributes:
        layer: counted from 0; -1 for the embedding.
        operator: its name.
        error: root mean square of output - definition, relative to the definition's.
        explained: how much of that rounding explains.
    """

    layer: int
    operator: str
    error: float
    explained: float

    @property
    def differs(self) -> bool:
        """Whether it computes something else. NaN does."""
        return not self.error <= self.explained

    @property
    def excess(self) -> float:
        """Error in units of what is explained; infinite for NaN."""
        return math.inf if math.isnan(self.error) else self.error / self.explained

    def __str__(self) -> str:
        return self.operator if self.operator in (EMBEDDING, FINAL_NORM) else f"layer {self.layer}, {self.operator}"


def operator_errors(trace: Trace, exact: Definition, rounded: Definition) -> Iterator[OperatorError]:
    """Of every operator, in order.

    Args:
        trace: of one forward pass.
        exact: the definition in float64.
        rounded: the same in the dtype of the side.
    """
    unit = torch.finfo(rounded.dtype).eps / 2

    def line(
        key: tuple[int, str], right: torch.Tensor, example: torch.Tensor, rows: torch.Tensor | None = None
    ) -> OperatorError:
        found = trace.outputs[key].to(right)
        kept = slice(None) if rows is None else rows
        explained = _ROOM * relative_error(example[kept], right[kept]) + unit
        return OperatorError(*key, relative_error(found[kept], right[kept]), explained)

    key = (-1, EMBEDDING)
    yield line(key, exact.embedding(trace.inputs[key]), rounded.embedding(trace.inputs[key]))
    for layer in range(exact.layers):
        of_exact, of_rounded = exact.operators(layer), rounded.operators(layer)
        for name in of_exact:
            key = (layer, name)
            if key not in trace.outputs:  # within the next one
                continue
            x = trace.inputs[key]
            norm = _BEFORE.get(name)
            fused = norm is not None and (layer, norm) not in trace.outputs
            right, example = (of[name](of[norm](x) if fused and norm else x) for of in (of_exact, of_rounded))
            yield line(
                key,
                right,
                example,
                _decided(of_exact[norm](x) if fused and norm else x, layer, exact, rounded) if name == ROUTER else None,
            )
            if name == ROUTER:
                key, weights = (layer, EXPERTS), trace.outputs[layer, ROUTER]
                x = trace.inputs[key]
                yield line(key, exact.experts(x, weights, layer), rounded.experts(x, weights, layer))
    key = (exact.layers, FINAL_NORM)
    yield line(key, exact.final_norm(trace.inputs[key]), rounded.final_norm(trace.inputs[key]))


@dataclass(frozen=True)
class Apart:
    """How far two sides' outputs of one operator are apart, with all that the operators before it have carried on.

    Attributes:
        layer: counted from 0; -1 for the embedding.
        operator: its name.
        difference: root mean square of first - second, relative to the second's; the worst of all sequences.
    """

    layer: int
    operator: str
    difference: float


def carried_apart(first: Sequence[Trace], second: Sequence[Trace]) -> list[Apart]:
    """Of every operator that both have, in order; traces of the same sequences."""
    return [
        Apart(*key, max(relative_error(a.outputs[key], b.outputs[key]) for a, b in zip(first, second, strict=True)))
        for key in first[0].outputs
        if key in second[0].outputs
    ]


def relative_error(x: torch.Tensor, right: torch.Tensor) -> float:
    """Root mean square of the difference over that of ``right``; 0 for nothing."""
    if not right.numel():
        return 0.0
    return float((x.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30))


def _decided(x: torch.Tensor, layer: int, exact: Definition, rounded: Definition) -> torch.Tensor:
    """[S] bool: tokens whose last chosen expert is farther ahead of the next one than rounding of scores can reach."""
    right = exact.router_scores(x, layer)
    reach = (rounded.router_scores(x, layer).to(right) - right).abs().amax()
    best = right.topk(exact.config.num_experts_per_tok + 1, dim=-1).values
    return best[:, -2] - best[:, -1] > 2 * _ROOM * reach  # each of the two may be off
