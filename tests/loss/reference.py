"""The loss written down a second time: token by token, dense, float64, plain autograd, straight from the papers' formulas.

It shares no code with the package, and trades everything for being checkable by eye.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEFAULT_DELTA = {"tv": 0.15, "kl": 0.05}


@dataclass
class Reference:
    loss: Tensor  # numerator
    magnitude: float  # the same sum of absolute values: terms of both signs may leave almost nothing of the numerator
    num_tokens: int
    weight: dict[tuple[int, int], float]
    divergence: dict[tuple[int, int], float]


def reference_loss(config: Any, logits: Tensor, vocab_size: int, batch: dict[str, Tensor]) -> Reference:
    """``logits`` [b, s, V] float64 with gradient; ``batch`` holds the keyword arguments of the loss."""
    mask = batch["loss_mask"]
    losses, weights, divergences = {}, {}, {}
    for b, s in mask.nonzero().tolist():
        token = {name: tensor[b, s].double() for name, tensor in batch.items()}
        log_pi_V = (logits[b, s, :vocab_size] / config.temperature).log_softmax(-1)
        losses[b, s], weights[b, s], divergences[b, s] = _token(config, log_pi_V, token)
    rows = [b for b in range(mask.shape[0]) if mask[b].any()]
    if config.aggregation == "token_mean":
        return Reference(sum(losses.values()), _magnitude(losses.values()), len(losses), weights, divergences)
    per_row = [[loss for (b, _), loss in losses.items() if b == row] for row in rows]
    if config.aggregation == "seq_mean_token_mean":
        terms = [loss / len(row) for row in per_row for loss in row]
    else:
        terms = [loss / config.horizon for row in per_row for loss in row]
    return Reference(sum(terms), _magnitude(terms), len(rows), weights, divergences)


def _magnitude(terms: Iterable[Tensor]) -> float:
    return sum(abs(term.item()) for term in terms)


def _token(config: Any, log_pi_V: Tensor, token: dict[str, Tensor]) -> tuple[Tensor, float, float]:
    a = int(token["target"])
    log_pi = log_pi_V[a]
    pi_V = log_pi_V.detach().exp()
    pi, mu, advantage = pi_V[a], token["rollout_log_probs"].exp(), token["advantages"]
    r = pi / mu
    divergence = _divergence(config, pi_V, a, mu, token)
    direction = _direction(config, pi_V, a, mu, advantage, token)
    if config.ratio_cap is not None:
        r_used = min(r, torch.tensor(config.ratio_cap))
    else:
        r_used = r
    weight = _weight(config, advantage, r, r_used, mu, pi, divergence, direction)
    loss = -(weight * r_used * advantage) * (1 + log_pi - log_pi.detach())
    loss = loss - config.entropy_coef * -(log_pi_V.exp() * log_pi_V).sum()
    if config.kl_coef:
        d = log_pi - token["ref_log_probs"]
        kl = {
            # k1's value; its gradient is that of E_pi[log pi - log ref] by the score-function identity
            "k1": d.detach() * (1 + log_pi - log_pi.detach()),
            "k2": d**2 / 2,
            "k3": torch.exp(-d) - 1 + d,
        }[config.kl_estimator]
        loss = loss + config.kl_coef * kl
    return loss, float(weight), float(divergence)


def _weight(config, advantage, r, r_used, mu, pi, divergence, direction):  # type: ignore[no-untyped-def]
    if config.trust_region == "none":
        return torch.tensor(1.0)
    if config.trust_region == "cispo":
        return r_used.clamp(config.cispo_ratio_min, config.cispo_ratio_max) / r_used
    if config.trust_region == "ppo_clip":
        dead = (advantage > 0 and r > 1 + config.ppo_clip_high) or (advantage < 0 and r < 1 - config.ppo_clip_low)
        if config.ppo_dual_clip is not None:
            dead = dead or (advantage < 0 and r > config.ppo_dual_clip)
        return torch.tensor(0.0 if dead else 1.0)
    default = 12.5 if config.trust_region == "smooth" else DEFAULT_DELTA[config.divergence[-2:]]
    delta = config.delta_high if advantage > 0 else config.delta_low
    delta = default if delta is None else delta
    if config.trust_region == "smooth":
        return 1 - direction * (pi - mu).abs() / delta
    return torch.tensor(0.0 if direction > 0 and divergence > delta else 1.0)


def _tv(mu: Tensor, pi: Tensor) -> Tensor:
    return (mu - pi).abs().sum() / 2


def _kl(mu: Tensor, pi: Tensor) -> Tensor:
    return sum((m * (m / p).log() for m, p in zip(mu, pi, strict=True) if m > 0), start=torch.tensor(0.0))


def _divergence(config: Any, pi_V: Tensor, a: int, mu: Tensor, token: dict[str, Tensor]) -> Tensor:
    partition, kind = config.divergence.split("_")
    distance = _tv if kind == "tv" else _kl
    if partition == "binary":
        return distance(torch.stack([mu, 1 - mu]), torch.stack([pi_V[a], 1 - pi_V[a]]))
    known = _engine_probabilities(a, mu, token)
    ids = list(known)
    if partition == "topk":
        mu_slots, pi_slots = torch.stack(list(known.values())), pi_V[ids]
        return distance(
            torch.cat([mu_slots, 1 - mu_slots.sum()[None]]), torch.cat([pi_slots, 1 - pi_slots.sum()[None]])
        )
    mu_V = (token["rollout_logits"][: len(pi_V)] / config.temperature).softmax(-1)
    if "rollout_topk_ids" in token:  # the engine's numbers where there are any
        mu_V = mu_V * (1 - sum(known.values())) / (1 - mu_V[ids].sum())
        mu_V[ids] = torch.stack(list(known.values()))
    return distance(mu_V, pi_V)


def _engine_probabilities(a: int, mu: Tensor, token: dict[str, Tensor]) -> dict[int, Tensor]:
    known: dict[int, Tensor] = {}
    if "rollout_topk_ids" in token:
        known = {
            int(i): p.exp() for i, p in zip(token["rollout_topk_ids"], token["rollout_topk_log_probs"], strict=True)
        }
    known.setdefault(a, mu)
    return known


def _direction(config: Any, pi_V: Tensor, a: int, mu: Tensor, advantage: Tensor, token: dict[str, Tensor]) -> Tensor:
    if config.direction == "ratio":
        return torch.sign(advantage * (pi_V[a] - mu))
    if config.direction == "symmetric":
        return torch.ones_like(mu)
    known = _engine_probabilities(a, mu, token)
    ids, mu_S = list(known), torch.stack(list(known.values()))
    pi_S, others = pi_V[ids], len(pi_V) - len(ids)
    m, q = 1 - mu_S.sum(), 1 - pi_S.sum()
    if config.predictive_estimator == "aggregated_tail":
        cross, square = m * q, q * q
    elif config.predictive_estimator == "uniform_tail":
        cross, square = m * q / others, q * q / others
    else:
        rest = torch.ones_like(pi_V, dtype=torch.bool)
        rest[ids] = False
        square = (pi_V[rest] ** 2).sum()
        cross = m / q * square
    step = pi_V[a] - mu + (pi_S * mu_S).sum() + cross - (pi_S**2).sum() - square
    return torch.sign(advantage * step)
