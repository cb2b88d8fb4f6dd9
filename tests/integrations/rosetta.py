"""Other implementations of DPPO read as settings of ours: on which tokens they differ from it, and why.

Every reading is compared at the same thresholds with the same divergence, without a ratio cap and anchored on the engine's
log-probs; the tests hold that they differ there and nowhere else. docs/rosetta.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dppo import DPPOConfig
from megatron_dppo.loss.token_losses import TokenLosses, token_losses
from tests.integrations.recording import load
from tests.integrations.rosetta_tokens import rosetta_tokens

DELTAS = {"tv": 0.15, "kl": 0.05}


@dataclass(frozen=True)
class Difference:
    """One thing that they do otherwise.

    Attributes:
        name, why: for the table and its legend.
        tokens: on which it shows; ``kl_tokens`` with binary KL, where that masks some of them.
    """

    name: str
    why: str
    tokens: tuple[str, ...]
    kl_tokens: tuple[str, ...] | None = None

    def shown(self, kind: str) -> set[str]:
        """Names of the tokens with this divergence."""
        return set(self.tokens if kind == "tv" or self.kl_tokens is None else self.kl_tokens)


_ABOVE_3 = ("rare, r 5", "rare, r 15", "rare, r 40", "rare, r 5, A < 0")
_FAR_OUT = "rare, r e^25"
CAP_3 = Difference(
    "cap 3",
    "the ratio is capped at 3: the code asks for another default (verl 20, Stable-RL 10), but the actor's configuration has "
    "the field `clip_ratio_c` for PPO's dual clip, and its 3.0 wins",
    (*_ABOVE_3, _FAR_OUT),
    _ABOVE_3,
)
CAP_10000 = Difference("cap 10000", "the ratio is capped at 10000; ours at e^20, for overflow only", (_FAR_OUT,), ())
ANCHOR = Difference(
    "anchor",
    "anchored on a recomputation, not on the policy that generated the sample",
    (
        "engine 0.5, recomputed 0.8, pi 0.75, A > 0",
        "engine 0.8, recomputed 0.5, pi 0.75, A > 0",
        "engine 0.9, recomputed 0.3, pi 0.25, A < 0",
    ),
)
FLOOR = Difference(
    "floor",
    "1 - pi is floored at 1e-8 (open-instruct: 1e-6), so the KL of a certain token stays small",
    (),
    ("pi exactly 1, mu 0.999, A > 0",),
)
NAN = Difference(
    "NaN",
    "p is clamped to 1 - 1e-9, which in fp32 is 1: the KL is NaN, NaN > delta is False, and the token is not masked",
    (),
    ("mu exactly 1, pi 0.5, A < 0",),
)
DEAD = Difference(
    "dead gradient", "the log-ratio is clamped at 20 inside the gradient: beyond it the gradient is 0", (_FAR_OUT,), ()
)
OVERFLOW = Difference("no clamp", "the log-ratio is not clamped", (_FAR_OUT,), ())


@dataclass(frozen=True)
class Reading:
    """One implementation in one setting.

    Attributes:
        where: implementation and setting, for the table.
        record: tests/integrations/records/NAME.json, and ...
        result: ... what in it.
        kind: tv | kl.
        differences: from ours; none: it is ours.
    """

    where: str
    record: str
    result: str
    kind: str
    differences: tuple[Difference, ...]

    def theirs(self) -> torch.Tensor:
        """[N] w r A as recorded."""
        return load(self.record)["results"][self.result]["coefficient"]

    def expected(self) -> set[str]:
        """Names of the tokens that differ."""
        return {name for difference in self.differences for name in difference.shown(self.kind)}


def ours(kind: str, **options: float) -> tuple[torch.Tensor, TokenLosses]:
    """[N] w r A of our loss, from its gradient, and everything else that it says of the tokens."""
    tokens = rosetta_tokens()
    log_pi = tokens.log_pi.clone().requires_grad_()
    config = DPPOConfig(divergence=f"binary_{kind}", delta_low=DELTAS[kind], delta_high=DELTAS[kind], **options)
    losses = token_losses(
        config,
        log_pi,
        rollout_log_probs=tokens.log_mu,
        advantages=tokens.advantages,
        loss_mask=None,
        backend="torch",
    )
    losses.per_token.sum().backward()
    assert log_pi.grad is not None
    return -log_pi.grad, losses


def _both(
    where: str, record: str, result: str, tv: tuple[Difference, ...], kl: tuple[Difference, ...]
) -> list[Reading]:
    return [
        Reading(where.format(kind=kind), record, result.format(kind=kind), kind, differences)
        for kind, differences in (("tv", tv), ("kl", kl))
    ]


def _readings() -> list[Reading]:
    verl, stable_rl, skyrl = "rosetta_verl", "rosetta_stable_rl", "rosetta_skyrl"
    kl_floor = (FLOOR,)
    rows = [
        ("verl `dppo_{kind}`, as configured by default", verl, "dppo_{kind}, cap 3, recomputed", (CAP_3, ANCHOR)),
        ("verl `dppo_{kind}`, with verl's example", verl, "dppo_{kind}, cap 10000, recomputed", (CAP_10000, ANCHOR)),
        ("verl `dppo_{kind}`, with `bypass_mode`", verl, "dppo_{kind}, cap 3, bypass", (CAP_3,)),
        (
            "verl `dppo_{kind}`, with both",
            verl,
            "dppo_{kind}, cap 10000, bypass",
            (CAP_10000,),
        ),
        ("Stable-RL `dppo_binary_{kind}`", stable_rl, "dppo_binary_{kind}, cap default", (CAP_3,)),
        (
            "Stable-RL `dppo_binary_{kind}`, `clip_ratio_c=10000`",
            stable_rl,
            "dppo_binary_{kind}, cap 10000",
            (CAP_10000,),
        ),
        (
            "Stable-RL `dppo_binary_{kind}_recompute` (an ablation)",
            stable_rl,
            "dppo_binary_{kind}_recompute, cap default",
            (CAP_3, ANCHOR),
        ),
        ("SkyRL `dppo`, `binary_{kind}`", skyrl, "binary_{kind}, rollout log-probs", (DEAD,)),
        (
            "SkyRL `dppo`, `binary_{kind}`, engine without log-probs",
            skyrl,
            "binary_{kind}, no rollout log-probs",
            (DEAD, ANCHOR),
        ),
    ]
    readings = [
        reading for *where, differences in rows for reading in _both(*where, differences, differences + kl_floor)
    ]
    readings += _both("TMax `dppo`, `{kind}`", "rosetta_tmax", "binary_{kind}", (OVERFLOW,), (OVERFLOW, NAN))
    readings += _both(
        "open-instruct's branch `dppo-loss`, `{kind}`",
        "rosetta_open_instruct",
        "binary_{kind}",
        (OVERFLOW,),
        (OVERFLOW, FLOOR),
    )
    return readings


READINGS = _readings()
DIFFERENCES = (CAP_3, CAP_10000, ANCHOR, FLOOR, NAN, DEAD, OVERFLOW)
