"""How much better than the rollout policy the present policy is at least, judged by the responses at hand.

With r the ratio pi / mu of every token of a response, A its advantage and J the expected reward, under mu

    J(pi) - J(mu)  =  E[A sum(r - 1)]  +  E[A Z],          Z = prod(r) - 1 - sum(r - 1)
                   >= E[A sum(r - 1)]  -  (range of rewards) E[max(0, -Z)]

The first term is the surrogate that the loss maximises, the second the most that it can be wrong by: it is attained by some
reward, and below the bounds of DPPO and of Trust Region Masking. docs/algorithm.md has the proof. Only the sampled tokens'
ratios are needed, whatever the divergence; the mean over responses is an unbiased estimate, and its standard error is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.dppo_loss import LossOutput
from megatron_dppo.loss.inputs import LossInputs, masked

CERTIFIED, VACUOUS, VIOLATED = 1.0, 0.0, -1.0
_STANDARD_ERRORS = 2.0  # one-sided 97.7 % for the mean of many responses
_COLUMNS = 6


@dataclass(frozen=True)
class ResponseSums:
    """Sums over the tokens of each response; parts of a response, of a batch, on several ranks add up. No gradient.

    Attributes:
        sums: [R, 6] fp64 of every response: A (r - 1), r - 1, log r, |r - 1|, (r - 1)^2, 1.
    """

    sums: torch.Tensor

    @classmethod
    def of(cls, inputs: LossInputs, output: LossOutput, responses: int) -> ResponseSums:
        """Of one call of the loss. Nothing waits for the device.

        Args:
            inputs: as the loss got them. ``sequences.ids`` lie in [0, responses), the same response having the same number in
                all parts; without them every row of a [b, s] batch is one. Advantages are those of whole responses, in
                units of the reward, and ``rollout_log_probs`` are of the policy that drew the tokens.
            output: what the loss made of them.
            responses: R, of the whole batch.

        Raises:
            LossInputError: packed tokens without ``sequences.ids``.
        """
        mask = None if inputs.loss_mask is None else inputs.loss_mask.reshape(-1).bool()
        log_mu, log_pi, advantages = (
            masked(values.reshape(-1), mask)
            for values in (inputs.rollout_log_probs.clamp(max=0.0), output.log_prob, inputs.advantages)
        )
        log_ratio = (log_pi - log_mu).double()
        excess = log_ratio.expm1()
        of_tokens = [
            advantages * excess,
            excess,
            log_ratio,
            excess.abs(),
            excess.square(),
            torch.ones_like(excess),
        ]
        sums = log_ratio.new_zeros(responses, _COLUMNS)
        return cls(sums.index_add_(0, _response_ids(inputs, mask), masked(torch.stack(of_tokens, dim=1), mask)))

    def __add__(self, other: ResponseSums) -> ResponseSums:
        """Of both parts."""
        return ResponseSums(self.sums + other.sums)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ResponseSums:
        """Over the ranks of ``group`` (None: all of them), on every rank. Collective."""
        sums = self.sums.clone()
        dist.all_reduce(sums, group=group)
        return ResponseSums(sums)

    def finalize(self, reward_range: float) -> dict[str, float]:
        """What is logged: {name: number}; nothing without a response that has tokens. **Waits for the device.**

        Args:
            reward_range: largest possible reward minus the smallest.
        """
        held = self.sums.cpu()
        surrogate, excess, log_ratio, change, squares, _ = held[held[:, -1] > 0].unbind(dim=1)
        if len(surrogate) == 0:
            return {}
        penalty = reward_range * (1.0 + excess - log_ratio.exp()).clamp(min=0.0)
        at_least, error = _mean_and_error(surrogate - penalty)
        at_most, upper_error = _mean_and_error(surrogate + penalty)
        verdict = VACUOUS
        if at_least > _STANDARD_ERRORS * error:
            verdict = CERTIFIED
        elif at_most < -_STANDARD_ERRORS * upper_error:
            verdict = VIOLATED
        return {
            "bound/surrogate": float(surrogate.mean()),
            "bound/penalty": float(penalty.mean()),
            "bound/penalty_quadratic": reward_range / 4.0 * float((change.square() - squares).mean()),
            "bound/improvement": at_least,
            "bound/standard_error": error,
            "bound/verdict": verdict,
        }


def _response_ids(inputs: LossInputs, mask: torch.Tensor | None) -> torch.Tensor:
    """[N] the response that every token is of."""
    if inputs.sequences is not None and inputs.sequences.ids is not None:
        return masked(inputs.sequences.ids.reshape(-1), mask, 0)
    shape = inputs.target.shape
    if len(shape) != 2:
        raise LossInputError("packed tokens: the improvement bound needs sequences.ids [n], the response of each token")
    return torch.arange(shape[0], device=inputs.target.device)[:, None].expand(shape).reshape(-1)


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean, and its standard error: infinite for one value."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), error
