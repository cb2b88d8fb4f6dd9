"""The verdict: which side is off, where first, and what would close the gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_dppo.launch.doctor.mismatch.comparison import BodyAndHead, Pair
from megatron_dppo.launch.doctor.mismatch.operators import Apart, OperatorError
from megatron_dppo.launch.doctor.mismatch.sides import POLICY, SERVER
from megatron_dppo.launch.doctor.mismatch.switches import Effect


@dataclass(frozen=True)
class Fault:
    """Something that rounding does not explain.

    Attributes:
        side: whose.
        where: operator, "head", or "body" where operators cannot be watched.
        what: in words.
        remedy: what to look at.
    """

    side: str
    where: str
    what: str
    remedy: str


@dataclass
class Diagnosis:
    """All that was measured.

    Attributes:
        model: folder.
        dtype: that all sides compute in.
        tokens: compared.
        pairs: of sides.
        parts: body and head of each side.
        operators: per side the worst of each operator over all sequences, in order.
        apart: policy against transformers, with all that is carried on from layer to layer.
        weights: names of checkpoint tensors that the policy holds with other numbers.
        effects: of switches on the policy.
    """

    model: str
    dtype: str
    tokens: int
    pairs: list[Pair]
    parts: list[BodyAndHead]
    operators: dict[str, list[OperatorError]]
    apart: list[Apart]
    weights: list[str]
    effects: list[Effect] = field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        """Of each side the first one; of a side whose operators are all right, its body or its head."""
        found = []
        for part in self.parts:
            operator = next((line for line in self.operators.get(part.side, []) if line.differs), None)
            if operator is not None:
                found.append(self._operator_fault(part.side, operator))
            elif part.body_differs and part.side not in self.operators:
                found.append(_body_fault(part))
            if part.head_differs:
                found.append(_head_fault(part))
        return found

    def _operator_fault(self, side: str, line: OperatorError) -> Fault:
        what = f"is {line.error:.1e} from its definition on its own input; rounding explains {line.explained:.1e}"
        remedy = _REMEDIES.get(line.operator, "compare its weights and settings with the folder's")
        held = [name for name in self.weights if name.startswith(f"model.layers.{line.layer}.")]
        if side == POLICY and held:
            remedy = f"it holds other numbers than the folder: {', '.join(held[:3])}"
        return Fault(side, str(line), what, remedy)

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.dtype}, {self.tokens} response tokens",
            "",
            *_table(_PAIRS, [_pair(p) for p in self.pairs]),
            "",
        ]
        lines += [*_table(_PARTS, [_part(p) for p in self.parts]), ""]
        lines += [*_table(_OPERATORS, _operators(self.operators)), ""]
        lines += [f"policy against transformers, carried on: {_carried(self.apart)}", ""]
        if self.effects:
            lines += [*_table(_EFFECTS, [[e.switch, f"{e.gap:.2e}", f"{e.closed:+.0%}"] for e in self.effects]), ""]
        if self.weights:
            lines.append(
                f"tensors that the policy holds with other numbers than the folder: {', '.join(self.weights[:5])}"
            )
        faults = self.faults
        lines += [f"error: {f.side}, {f.where}: {f.what}\n  -> {f.remedy}" for f in faults]
        if not faults:
            lines.append("healthy: every side computes what the folder says, up to the rounding of the dtype")
        if SERVER not in {part.side for part in self.parts}:
            lines.append("note: no server was asked (--server-python)")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        operators = {
            side: [{**asdict(line), "differs": line.differs} for line in lines]
            for side, lines in self.operators.items()
        }
        parts = [{**asdict(p), "body_differs": p.body_differs, "head_differs": p.head_differs} for p in self.parts]
        plain = {name: value for name, value in asdict(self).items() if name not in ("operators", "parts")}
        return {**plain, "parts": parts, "operators": operators, "faults": [asdict(fault) for fault in self.faults]}


_REMEDIES = {
    "attention": "its rope settings (rope_theta, scaling), its q and k norms, its head counts, or one of its matrices",
    "input norm": "rms_norm_eps, or the norm's weight",
    "post-attention norm": "rms_norm_eps, or the norm's weight",
    "final norm": "rms_norm_eps, or the norm's weight",
    "router": "norm_topk_prob, num_experts_per_tok, or the router's matrix",
}


def _body_fault(part: BodyAndHead) -> Fault:
    what = f"last hidden states are {part.body:.1e} off (median); rounding explains {part.body_explained:.1e}"
    return Fault(part.side, "body", what, "its layers, weights or settings: it shows nothing before the final norm")


def _head_fault(part: BodyAndHead) -> Fault:
    what = (
        f"log-probs are {part.head:.1e} from what its own hidden states give; fp32 explains {part.head_explained:.1e}"
    )
    if part.head_is_rounded:
        remedy = "--enable-fp32-lm-head" if part.side == SERVER else "model.fp32_head=true"
        return Fault(part.side, "head", f"{what}: it rounds its logits to 16 bits", f"{remedy} (docs/mismatch.md)")
    return Fault(part.side, "head", what, "the output layer's matrix, or a temperature")


_PAIRS = ["sides", "mean abs log ratio", "largest", "KL (k3)"]
_PARTS = ["side", "body off by", "rounding explains", "head off by", "fp32 explains"]
_OPERATORS = ["side", "operator", "worst at", "error", "rounding explains"]
_EFFECTS = ["switch on the policy", "gap", "closed"]


def _pair(pair: Pair) -> list[str]:
    return [f"{pair.first} - {pair.second}", f"{pair.mean:.2e}", f"{pair.largest:.2e}", f"{pair.kl:.2e}"]


def _part(part: BodyAndHead) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    return [part.side, number(part.body), number(part.body_explained), number(part.head), number(part.head_explained)]


def _operators(operators: Mapping[str, Sequence[OperatorError]]) -> list[list[str]]:
    """Of each side and operator the layer that is farthest beyond, or nearest to, what is explained."""
    rows = []
    for side, lines in operators.items():
        for name in dict.fromkeys(line.operator for line in lines):
            worst = max((line for line in lines if line.operator == name), key=lambda line: line.excess)
            rows.append([side, name, str(worst), f"{worst.error:.1e}", f"{worst.explained:.1e}"])
    return rows


def _carried(apart: Sequence[Apart]) -> str:
    """After the first layer, the middle one, the last one and the final norm; the JSON has every operator."""
    after = {each.layer: each.difference for each in apart if each.layer >= 0}
    count = max(after)  # the layer of the final norm
    shown = sorted({0, count // 2, count - 1})
    layers = [f"{after[layer]:.1e} in layer {layer}" for layer in shown]
    return ", ".join([*layers, f"{after[count]:.1e} after the final norm"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
