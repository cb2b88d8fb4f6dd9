"""Four small rollouts that every framework's record is made from: what a serving engine returned, and a policy's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, Sequences

VOCAB, PADDED, TEMPERATURE = 19, 24, 0.8
LENGTHS = ((3, 4), (2, 6), (4, 3), (3, 5))  # prompt, response
CONFIG = DPPOConfig(divergence="binary_tv", delta_low=0.1, delta_high=0.1)


@dataclass(frozen=True)
class Rollout:
    """One sample. Positions count from its first prompt token; R response tokens.

    Attributes:
        tokens: [L] prompt and response.
        prompt_length: L - R.
        loss_mask: [R] int64, 0 for the two tokens that a tool returned.
        rollout_log_probs: [R] fp32, at TEMPERATURE over VOCAB.
        advantage: the same for all its tokens.
        logits: [L, PADDED] of the policy that is trained; row t predicts token t + 1. Padded columns are far from small.
    """

    tokens: torch.Tensor
    prompt_length: int
    loss_mask: torch.Tensor
    rollout_log_probs: torch.Tensor
    advantage: float
    logits: torch.Tensor

    @property
    def predicting(self) -> slice:
        """Positions whose logits predict the response."""
        return slice(self.prompt_length - 1, len(self.tokens) - 1)

    @property
    def response(self) -> torch.Tensor:
        """[R] tokens."""
        return self.tokens[self.prompt_length :]


def make_rollouts() -> list[Rollout]:
    """The same every time; advantages of both signs and 0, drift that takes some tokens out of the trust region."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for (prompt, response), advantage in zip(LENGTHS, (1.0, -1.0, 0.0, -0.5), strict=True):
        length = prompt + response
        rollout_logits = 2.0 * torch.randn(length, PADDED, generator=generator)
        mu_V = (rollout_logits[:, :VOCAB] / TEMPERATURE).softmax(-1)
        tokens = torch.multinomial(mu_V.roll(1, 0), 1, generator=generator)[:, 0]  # the first one is any
        logits = rollout_logits + 0.7 * torch.randn(length, PADDED, generator=generator)
        logits[:, VOCAB:] = 3.0
        log_mu = mu_V[:-1].gather(-1, tokens[1:, None])[:, 0].log()
        mask = torch.ones(response, dtype=torch.int64)
        if response > 5:
            mask[2:4] = 0
        rollouts.append(Rollout(tokens, prompt, mask, log_mu[prompt - 1 :], advantage, logits))
    return rollouts


def packed_logits() -> torch.Tensor:
    """[T, PADDED] of all rollouts one after the other."""
    return torch.cat([rollout.logits for rollout in make_rollouts()])


def own_step(config: DPPOConfig, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What this project's trainer computes from the rollouts: the mean loss, and the gradient [T, PADDED] of the logits."""
    rollouts = make_rollouts()
    logits = packed_logits().requires_grad_()
    fields: dict[str, list[torch.Tensor]] = {name: [] for name in ("target", "mask", "advantages", "log_mu")}
    for rollout in rollouts:
        before, length = rollout.prompt_length - 1, len(rollout.tokens)
        fields["target"].append(rollout.tokens.roll(-1))
        fields["mask"].append(_placed(rollout.loss_mask, before, length))
        fields["advantages"].append(torch.full((length,), rollout.advantage))
        fields["log_mu"].append(_placed(rollout.rollout_log_probs, before, length))
    ids = [torch.full((len(rollout.tokens),), i) for i, rollout in enumerate(rollouts)]
    inputs = LossInputs(
        sequences=Sequences(ids=torch.cat(ids)),
        target=torch.cat(fields["target"]),
        loss_mask=torch.cat(fields["mask"]),
        advantages=torch.cat(fields["advantages"]),
        rollout_log_probs=torch.cat(fields["log_mu"]),
    )
    output = DPPOLoss(config, vocab_size=vocab_size, backend="torch")(logits, inputs)
    mean = output.loss / output.num_tokens
    mean.backward()
    assert logits.grad is not None
    return mean.detach(), logits.grad


def _placed(values: torch.Tensor, before: int, length: int) -> torch.Tensor:
    """[length] with the response's values where its tokens are predicted, 0 elsewhere."""
    placed = values.new_zeros(length)
    placed[before : before + len(values)] = values
    return placed
