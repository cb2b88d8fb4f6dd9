"""Tokens on which implementations of DPPO may disagree: each has a name, and stands where one of them might go wrong."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """[N] each; log-probs are fp32.

    Attributes:
        names: what each token is there for.
        log_mu: under the policy that generated it.
        log_old: a recomputation under the weights that the update starts from.
        log_pi: under the policy that is trained.
        advantages: of both signs, and 0.
    """

    names: list[str]
    log_mu: torch.Tensor
    log_old: torch.Tensor
    log_pi: torch.Tensor
    advantages: torch.Tensor


def _tokens() -> list[tuple[str, float, float, float]]:
    """Name, log mu, log pi, A."""
    grid = itertools.product((0.02, 0.3, 0.7, 0.95), (0.9, 1.1, 0.5, 1.4), (1.0, -1.0))
    tokens = [(f"mu {mu:g}, r {r:g}, A {a:g}", math.log(mu), math.log(mu * r), a) for mu, r, a in grid if mu * r < 1.0]
    tokens += [
        ("A 0, far out", math.log(0.7), math.log(0.3), 0.0),
        ("A 0, unmoved", math.log(0.7), math.log(0.7), 0.0),
        ("unmoved", math.log(0.6), math.log(0.6), 1.0),
        ("rare, r 5", math.log(1e-3), math.log(5e-3), 1.0),
        ("rare, r 15", math.log(1e-3), math.log(1.5e-2), 1.0),
        ("rare, r 40", math.log(1e-3), math.log(4e-2), 1.0),
        ("rare, r 5, A < 0", math.log(1e-3), math.log(5e-3), -1.0),
        ("rare, r e^25", -27.0, -2.0, 1.0),
        ("rare, r e^-25", -2.0, -27.0, 1.0),
        ("mu exactly 1, pi 0.5, A < 0", 0.0, math.log(0.5), -1.0),
        ("mu exactly 1, pi 0.97, A < 0", 0.0, math.log(0.97), -1.0),
        ("mu exactly 1, pi 0.5, A > 0", 0.0, math.log(0.5), 1.0),
        ("pi exactly 1, mu 0.9, A > 0", math.log(0.9), 0.0, 1.0),
        ("pi exactly 1, mu 0.999, A > 0", math.log(0.999), 0.0, 1.0),
        ("both exactly 1", 0.0, 0.0, -1.0),
        ("1 - mu 1e-7, 1 - pi 1e-3, A < 0", math.log1p(-1e-7), math.log1p(-1e-3), -1.0),
        ("1 - mu 1e-2, 1 - pi 1e-9, A > 0", math.log1p(-1e-2), math.log1p(-1e-9), 1.0),
    ]
    return tokens


# The anchor decides about these.
_DISAGREEING = [
    ("engine 0.5, recomputed 0.8, pi 0.75, A > 0", math.log(0.5), math.log(0.8), math.log(0.75), 1.0),
    ("engine 0.8, recomputed 0.5, pi 0.75, A > 0", math.log(0.8), math.log(0.5), math.log(0.75), 1.0),
    ("engine 0.9, recomputed 0.3, pi 0.25, A < 0", math.log(0.9), math.log(0.3), math.log(0.25), -1.0),
]


TOPK, TOPK_VOCAB = 4, 19


@dataclass(frozen=True)
class TopKTokens:
    """[N, V] logits and what an engine reports of its K likeliest tokens; a third of the sampled ones are not among them."""

    logits: torch.Tensor
    target: torch.Tensor
    log_mu: torch.Tensor
    topk_ids: torch.Tensor
    topk_log_mu: torch.Tensor

    @property
    def outside(self) -> torch.Tensor:
        """[N] bool: the sampled token is none of the K."""
        return (self.topk_ids != self.target[:, None]).all(dim=1)


def topk_tokens() -> TopKTokens:
    """The same every time."""
    generator = torch.Generator().manual_seed(0)
    rollout = 2.0 * torch.randn(24, TOPK_VOCAB, generator=generator)
    log_mu_V = rollout.log_softmax(-1)
    topk_log_mu, topk_ids = log_mu_V.topk(TOPK, dim=-1)
    order = log_mu_V.argsort(dim=-1, descending=True)
    target = order.gather(1, (torch.arange(24) % 6)[:, None])[:, 0]  # the likeliest to the sixth likeliest, in turn
    log_mu = log_mu_V.gather(1, target[:, None])[:, 0]
    logits = rollout + 0.7 * torch.randn(24, TOPK_VOCAB, generator=generator)
    return TopKTokens(logits, target, log_mu, topk_ids, topk_log_mu)


def rosetta_tokens() -> Tokens:
    """The same every time; but for those that are there for it, engine and recomputation agree."""
    rows = [(name, mu, mu, pi, a) for name, mu, pi, a in _tokens()] + _DISAGREEING
    names, log_mu, log_old, log_pi, advantages = zip(*rows, strict=True)
    tensors = (torch.tensor(values, dtype=torch.float32) for values in (log_mu, log_old, log_pi, advantages))
    return Tokens(list(names), *tensors)
