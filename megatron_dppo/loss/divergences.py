"""How far the policy has moved from the rollout policy at one token: D(mu || pi), from log-probs.

``binary_*`` sees the sampled token against everything else; ``topk_*`` sees the K tokens the engine reported, the
sampled token, and everything else (2602.04879, Eq. 15-16). Each is a coarser partition of the vocabulary than the next,
so binary <= top-K <= exact for one and the same pair of policies. (``exact_*`` is ``ops/exact_divergence.py``.)

D is never NaN: NaN > delta would be False, and the worst update would pass unmasked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_dppo.ops.probability import LOG_ZERO, log1mexp, remaining_mass


class KnownTokens(NamedTuple):
    """Tokens known under both policies: the engine's top K, and the sampled token in the last slot.

    If the sampled token is among the top K its own slot is not valid: it takes no other token's place, nor counts
    twice.

    Attributes:
        log_mu: [n, K + 1] rollout log-probs.
        log_pi: [n, K + 1] policy log-probs.
        valid: [n, K + 1] bool.
        mu_other: [n] rollout probability of all other tokens together.
        pi_other: [n] policy probability of all other tokens together.
    """

    log_mu: torch.Tensor
    log_pi: torch.Tensor
    valid: torch.Tensor
    mu_other: torch.Tensor
    pi_other: torch.Tensor

    @property
    def mu(self) -> torch.Tensor:
        """[n, K + 1] rollout probabilities, 0 in slots that are not valid."""
        return self.log_mu.exp().masked_fill(~self.valid, 0.0)

    @property
    def pi(self) -> torch.Tensor:
        """[n, K + 1] policy probabilities, 0 in slots that are not valid."""
        return self.log_pi.exp().masked_fill(~self.valid, 0.0)


def sampled_slot_valid(topk_ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[n, K] ids, [n] sampled tokens -> [n, K + 1] which slots of ``KnownTokens`` count."""
    outside = (topk_ids != target[:, None]).all(dim=1, keepdim=True)
    return torch.cat([torch.ones_like(topk_ids, dtype=torch.bool), outside], dim=1)


def known_tokens(
    log_mu: torch.Tensor,
    log_pi: torch.Tensor,
    target: torch.Tensor,
    topk_ids: torch.Tensor | None,
    topk_log_mu: torch.Tensor | None,
    topk_log_pi: torch.Tensor | None,
) -> KnownTokens:
    """[n] values of the sampled token and [n, K] of the top K (None: nothing is known of it) -> KnownTokens."""
    all_log_mu, all_log_pi = log_mu[:, None], log_pi[:, None]
    valid = torch.ones_like(all_log_mu, dtype=torch.bool)
    if topk_ids is not None and topk_log_mu is not None and topk_log_pi is not None:
        valid = sampled_slot_valid(topk_ids, target)
        all_log_mu = torch.cat([topk_log_mu, all_log_mu], dim=1)
        all_log_pi = torch.cat([topk_log_pi, all_log_pi], dim=1)
    return KnownTokens(
        all_log_mu, all_log_pi, valid, remaining_mass(all_log_mu, valid), remaining_mass(all_log_pi, valid)
    )


def binary_tv(log_mu: torch.Tensor, log_pi: torch.Tensor) -> torch.Tensor:
    """|mu - pi|."""
    return (log_mu.exp() - log_pi.exp()).abs()


def binary_kl(log_mu: torch.Tensor, log_pi: torch.Tensor) -> torch.Tensor:
    """mu log(mu/pi) + (1 - mu) log((1 - mu)/(1 - pi)); large and finite where pi = 1 > mu or pi = 0 < mu."""
    sampled = log_mu.exp() * (log_mu - log_pi.clamp(min=LOG_ZERO))
    other = -torch.expm1(log_mu) * (log1mexp(log_mu) - log1mexp(log_pi))
    return (sampled + other).clamp(min=0.0)


def topk_tv(tokens: KnownTokens) -> torch.Tensor:
    """Half the L1 distance over TopK, the sampled token and ``other``."""
    return 0.5 * ((tokens.mu - tokens.pi).abs().sum(dim=1) + (tokens.mu_other - tokens.pi_other).abs())


def topk_kl(tokens: KnownTokens) -> torch.Tensor:
    """sum mu log(mu / pi) over TopK, the sampled token and ``other``."""
    slots = tokens.mu * (tokens.log_mu.clamp(min=LOG_ZERO) - tokens.log_pi.clamp(min=LOG_ZERO))
    tiny = torch.finfo(tokens.mu_other.dtype).tiny
    other = tokens.mu_other * (tokens.mu_other.clamp(min=tiny).log() - tokens.pi_other.clamp(min=tiny).log())
    return (slots.sum(dim=1) + other).clamp(min=0.0)
