"""Policies so small that every response can be summed over, in float64; and what bounds promise of them.

A policy is a table of logits [prefixes, V], one row for every prefix that a response can have. Expectations are sums over all
responses, so what holds here holds of the formulas and not of samples. ``python -m tests.loss.enumerable_policy`` prints how
loose the bounds are on 1,000 updates, as docs/algorithm.md has it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

REWARD_RANGE = 1.0
BOUNDS = {
    "remainder": "remainder, `bound/penalty`",
    "quadratic": "quadratic, `bound/penalty_quadratic`",
    "linear": "linear",
    "adaptive": "adaptive",
    "pinsker_marginal": "Pinsker-marginal",
    "mixed": "mixed",
    "coupling": "coupling",
    "worst_case": "worst case, quadratic in T",
}


@dataclass(frozen=True)
class Responses:
    """All responses over ``vocab`` tokens of at most ``horizon``; where they ``stop``, token 0 ends one.

    Attributes:
        prefixes: [S, T] which row of a policy's table gives each token; 0 behind the end.
        tokens: [S, T] 0 behind the end.
        mask: [S, T] False behind the end.
    """

    vocab: int
    horizon: int
    prefixes: Tensor
    tokens: Tensor
    mask: Tensor

    @property
    def num_prefixes(self) -> int:
        return int(self.prefixes.max()) + 1


def all_responses(vocab: int, horizon: int, stop: bool) -> Responses:
    """Those of a small tree."""
    rows: dict[tuple[int, ...], int] = {}
    responses = []
    for word in itertools.product(range(vocab), repeat=horizon):
        end = word.index(0) + 1 if stop and 0 in word else horizon
        responses.append(word[:end])
    prefixes, tokens, mask = [], [], []
    for word in dict.fromkeys(responses):
        padding = [0] * (horizon - len(word))
        prefixes.append([rows.setdefault(word[:t], len(rows)) for t in range(len(word))] + padding)
        tokens.append([*word, *padding])
        mask.append([True] * len(word) + [False] * len(padding))
    return Responses(vocab, horizon, torch.tensor(prefixes), torch.tensor(tokens), torch.tensor(mask))


def token_log_probs(responses: Responses, logits: Tensor) -> Tensor:
    """[..., prefixes, V] -> [..., S, T] log-prob of every token of every response, 0 behind the end."""
    log_probs = logits.log_softmax(-1)[..., responses.prefixes, responses.tokens]
    return log_probs.masked_fill(~responses.mask, 0.0)


def expected_reward(responses: Responses, logits: Tensor, rewards: Tensor) -> Tensor:
    """[...] from [..., prefixes, V] and [..., S]."""
    return (token_log_probs(responses, logits).sum(-1).exp() * rewards).sum(-1)


def surrogate(responses: Responses, rollout: Tensor, policy: Tensor, rewards: Tensor) -> Tensor:
    """[...] E_mu[R sum(r - 1)]."""
    log_mu, log_pi = token_log_probs(responses, rollout), token_log_probs(responses, policy)
    return (log_mu.sum(-1).exp() * rewards * (log_pi - log_mu).expm1().sum(-1)).sum(-1)


def remainder(responses: Responses, rollout: Tensor, policy: Tensor) -> Tensor:
    """[..., S] Z = prod(r) - 1 - sum(r - 1)."""
    log_ratio = token_log_probs(responses, policy) - token_log_probs(responses, rollout)
    return log_ratio.sum(-1).expm1() - log_ratio.expm1().sum(-1)


def total_variation(rollout: Tensor, policy: Tensor) -> Tensor:
    """[..., V] logits -> [...]."""
    return (rollout.softmax(-1) - policy.softmax(-1)).abs().sum(-1) / 2


def penalties(responses: Responses, rollout: Tensor, policy: Tensor) -> dict[str, Tensor]:
    """[...] what each of ``BOUNDS`` takes off the surrogate, from [..., prefixes, V]."""
    log_mu, log_pi = token_log_probs(responses, rollout), token_log_probs(responses, policy)
    weight = log_mu.sum(-1).exp()  # [..., S] mu(response)
    change = (log_pi - log_mu).expm1().abs()  # [..., S, T] |r - 1|

    def expectation(values: Tensor) -> Tensor:
        return (weight * values).sum(-1)

    tv = total_variation(rollout, policy)  # [..., prefixes]
    kl = (rollout.softmax(-1) * (rollout.log_softmax(-1) - policy.log_softmax(-1))).sum(-1)
    tv_at = tv[..., responses.prefixes].masked_fill(~responses.mask, 0.0)  # [..., S, T]
    kl_at = kl[..., responses.prefixes].masked_fill(~responses.mask, 0.0)
    horizon, steps = responses.horizon, torch.arange(responses.horizon, dtype=torch.float64)
    eps, delta = tv.amax(-1)[..., None], kl.amax(-1)[..., None]
    one_step = torch.minimum(eps, (delta / 2).sqrt()).clamp(max=1.0)  # [..., 1]

    def within(count: Tensor) -> tuple[Tensor, Tensor]:
        """[..., T] total variation of so many tokens, by coupling and by Pinsker."""
        return (count * eps).clamp(max=1.0), (count * delta / 2).sqrt().clamp(max=1.0)

    of_prefix, of_rest = within(steps), within(horizon - 1 - steps)
    of_all = (log_mu.sum(-1).exp() - log_pi.sum(-1).exp()).abs().sum(-1) / 2
    of_all = torch.minimum(of_all, (expectation(kl_at.sum(-1)) / 2).sqrt()).clamp(max=1.0)
    tv_of_step = (weight[..., None] * tv_at).sum(-2)  # [..., T] mean over the rollout policy's prefixes
    double = 2 * REWARD_RANGE
    return {
        "remainder": REWARD_RANGE * expectation((-remainder(responses, rollout, policy)).clamp(min=0.0)),
        "quadratic": REWARD_RANGE / 2 * expectation((change[..., 1:] * change.cumsum(-1)[..., :-1]).sum(-1)),
        "linear": double * expectation(tv_at.sum(-1)),
        "adaptive": double * (tv_of_step * torch.minimum(*of_rest)).sum(-1),
        "pinsker_marginal": double * (one_step * of_prefix[1]).sum(-1),
        "mixed": double * horizon * one_step[..., 0] * of_all,
        "coupling": double * (one_step * of_prefix[0]).sum(-1),
        "worst_case": REWARD_RANGE * horizon * (horizon - 1) * eps[..., 0] ** 2,
    }


@dataclass(frozen=True)
class Updates:
    """A number of pairs of policies [B, prefixes, V] and rewards [B, S] in [0, 1]."""

    responses: Responses
    rollout: Tensor
    policy: Tensor
    rewards: Tensor

    def improvement(self) -> Tensor:
        """[B] J(pi) - J(mu)."""
        after, before = (expected_reward(self.responses, x, self.rewards) for x in (self.policy, self.rollout))
        return after - before

    def surrogate(self) -> Tensor:
        """[B]."""
        return surrogate(self.responses, self.rollout, self.policy, self.rewards)


def random_updates(seed: int, count: int, responses: Responses) -> Updates:
    """Policy-gradient steps of sizes from 1e-3 to 30 in the logits, with noise of sizes from 1e-4 to 10."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def size(low: float, high: float) -> Tensor:
        uniform = torch.rand(count, 1, 1, generator=generator, dtype=torch.float64)
        return (math.log(low) + (math.log(high) - math.log(low)) * uniform).exp()

    rollout = (2 * normal(count, responses.num_prefixes, responses.vocab)).requires_grad_()
    rewards = torch.rand(count, len(responses.tokens), generator=generator, dtype=torch.float64)
    rewards[::2] = rewards[::2].round()  # right or wrong
    (gradient,) = torch.autograd.grad(expected_reward(responses, rollout, rewards).sum(), rollout)
    gradient = gradient / gradient.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    rollout = rollout.detach()
    policy = rollout + size(1e-3, 30.0) * gradient + size(1e-4, 10.0) * normal(*rollout.shape)
    return Updates(responses, rollout, policy, rewards)


def thousand_updates() -> list[Updates]:
    """Of four trees."""
    trees = [(3, 4, False), (3, 5, False), (4, 3, True), (4, 5, True)]
    return [random_updates(seed, 250, all_responses(*tree)) for seed, tree in enumerate(trees)]


def looseness_table() -> list[str]:
    """Rows of docs/algorithm.md: how many times its error each bound allows, and which improvements it certifies."""
    updates = thousand_updates()
    improvement = torch.cat([u.improvement() for u in updates])
    surrogates = torch.cat([u.surrogate() for u in updates])
    of_updates = [penalties(u.responses, u.rollout, u.policy) for u in updates]
    error, better = (improvement - surrogates).abs(), improvement > 0
    rows = []
    for name, label in BOUNDS.items():
        penalty = torch.cat([of_update[name] for of_update in of_updates])
        low, middle, high = (penalty / error).quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
        certified = (surrogates - penalty > 0)[better].double().mean()
        rows.append(f"| {label} | {low:.3g} | {middle:.3g} | {high:.3g} | {100 * certified:.0f} % |")
    return rows


if __name__ == "__main__":
    print("\n".join(looseness_table()))
