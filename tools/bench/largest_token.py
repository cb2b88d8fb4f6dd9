"""How much of a step's gradient one token takes whose reported log-prob is far too small, or truly tiny.

    python tools/bench/largest_token.py [--tokens 2000] [--policy-log-prob -7]

Of a batch of samples, one token is reported at -3.4e38 (what SGLang makes of a probability that it lost), -18 or -12, where
the policy has -7. The table gives its share of the squared gradient norm with respect to the logits, for every divergence
that needs no second pass, and for both signs of its advantage: with the loss alone, and as the trainer has it
(``rollout.log_prob_floor``, ``algorithm.loss.ratio_cap``). It is the table of docs/algorithm.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, TopK
from megatron_dppo.training.config.schema import Config

REPORTED = (-3.4e38, -18.0, -12.0)
DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")
VOCAB, TOPK = 1000, 20
POLICY_LOG_PROB = -7.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000, help="of the batch")
    parser.add_argument("--policy-log-prob", type=float, default=POLICY_LOG_PROB, help="of that token")
    options = parser.parse_args()
    print("| reported log-prob | A | the loss alone | with the trainer's floor and cap |\n|---|---|---|---|")
    for reported in REPORTED:
        for advantage in (1.0, -1.0):
            print(row(reported, advantage, options.tokens, options.policy_log_prob))


def row(reported: float, advantage: float, tokens: int = 2000, policy_log_prob: float = POLICY_LOG_PROB) -> str:
    """A line of the table; the range over the divergences, if they differ."""
    cells = []
    for as_trainer in (False, True):
        shares = [share(d, reported, advantage, as_trainer, tokens, policy_log_prob) for d in DIVERGENCES]
        texts = dict.fromkeys(
            f"{value:.2g}" if value < 0.99 else f"{value:.4f}" for value in (min(shares), max(shares))
        )
        cells.append(" to ".join(texts))
    return f"| {reported:g} | {'> 0' if advantage > 0 else '< 0'} | {' | '.join(cells)} |"


def share(
    divergence: str,
    reported: float,
    advantage: float,
    as_trainer: bool,
    tokens: int = 2000,
    policy_log_prob: float = POLICY_LOG_PROB,
) -> float:
    """The first token's share of the squared gradient norm."""
    logits, inputs = batch(reported, advantage, tokens, policy_log_prob)
    config = DPPOConfig(divergence=divergence)
    if as_trainer:
        trainer = Config()
        config = dataclasses.replace(config, ratio_cap=trainer.algorithm.loss.ratio_cap)
        inputs = dataclasses.replace(inputs, loss_mask=inputs.rollout_log_probs >= trainer.rollout.log_prob_floor)
    logits.requires_grad_()
    DPPOLoss(config, vocab_size=VOCAB)(logits, inputs).loss.backward()
    assert logits.grad is not None
    squares = logits.grad.double().square().sum(dim=1)
    return float(squares[0] / squares.sum())


def batch(reported: float, advantage: float, tokens: int, policy_log_prob: float) -> tuple[torch.Tensor, LossInputs]:
    """[tokens, VOCAB] logits, and samples of a policy that differs from theirs by noise; the first is the token."""
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(tokens, VOCAB, generator=generator)
    noise = 0.05 * torch.randn(tokens, VOCAB, generator=generator)
    target = torch.multinomial((logits + noise).softmax(-1), 1, generator=generator)[:, 0]
    advantages = torch.randn(tokens, generator=generator)
    advantages[0] = advantage
    # x - log(sum of the others + exp x) = policy_log_prob
    others = logits[0].clone()
    others[target[0]] = -math.inf
    logits[0, target[0]] = others.logsumexp(0) + policy_log_prob - math.log1p(-math.exp(policy_log_prob))
    log_mu = (logits + noise).log_softmax(-1)
    rollout_log_probs = log_mu.gather(1, target[:, None])[:, 0]
    rollout_log_probs[0] = reported
    log_mu[0, target[0]] = reported
    top = log_mu.topk(TOPK, dim=-1)
    return logits, LossInputs(
        target=target,
        loss_mask=None,
        advantages=advantages,
        rollout_log_probs=rollout_log_probs,
        rollout_topk=TopK(ids=top.indices, log_probs=top.values),
    )


if __name__ == "__main__":
    main()
