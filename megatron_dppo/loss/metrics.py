"""What a trust-region user watches, as sums that can be reduced over micro-batches and ranks before they are read.

Three kinds of numbers: means as numerator and denominator, to be added; maxima (a minimum travels negated); and a histogram
of the divergence, to be added, from which the 99th percentile is read. ``MetricSums`` holds all of them, on the device.

``dppo/*`` count tokens with A != 0 only: the others have no update that a trust region could hold back. ``mismatch/*``
and ``entropy`` count every token of the mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
import torch.distributed as dist

from megatron_dppo.loss.trust_region import ppo_clips

HISTOGRAM_BINS_PER_DECADE = 40  # a bin is 5.9 % wide: a percentile, read at its middle, is within 3 %
HISTOGRAM_LOWEST, HISTOGRAM_HIGHEST = -6, 2  # powers of ten; one bin more at either end for what lies outside
HISTOGRAM_BINS = HISTOGRAM_BINS_PER_DECADE * (HISTOGRAM_HIGHEST - HISTOGRAM_LOWEST)

BAD_UPDATE_DROP = 0.5  # 2602.04879: updates with A < 0 and mu - pi >= 0.5 suffice to destabilise training
PPO_REFERENCE_CLIP = 0.2
ROLLOUT_PROBABILITY_BINS = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
MASK_FRACTION_OF_BIN = tuple(
    f"dppo/mask_fraction_mu_{low:g}_{high:g}" for low, high in itertools.pairwise(ROLLOUT_PROBABILITY_BINS)
)
_NEGATED = "_negated"
LOSS = "loss"  # of the mean over tokens, the sum of -w r A; a loss that is made otherwise puts its own in this place
# Of |w r A|; what is logged is the quotient of both, the share of the largest.
_UPDATES, _LARGEST_UPDATE = "dppo/update_mean", "dppo/update_max"
MAXIMA = (
    "dppo/divergence_max",
    "mismatch/ratio_max",
    "mismatch/ratio_min" + _NEGATED,
    "mismatch/prob_change_max",
    _LARGEST_UPDATE,
)


@dataclass(frozen=True)
class MetricSums:
    """Metrics that are not finished yet: ``a + b`` is those of both parts. Nothing here carries gradient.

    Attributes:
        mean_names: what the rows of ``means`` are called.
        means: [M, 2] fp64 numerators and denominators.
        maximum_names: what ``maxima`` are called.
        maxima: [E] fp64, -inf where there was nothing.
        histogram: [HISTOGRAM_BINS + 2] int64 counts of the divergence.
    """

    mean_names: tuple[str, ...]
    means: torch.Tensor
    maximum_names: tuple[str, ...]
    maxima: torch.Tensor
    histogram: torch.Tensor

    def __add__(self, other: MetricSums) -> MetricSums:
        """Sums of both; ValueError if they do not have the same metrics."""
        if (self.mean_names, self.maximum_names) != (other.mean_names, other.maximum_names):
            different = set(self.mean_names + self.maximum_names) ^ set(other.mean_names + other.maximum_names)
            raise ValueError(
                f"metrics of different kinds do not add up; only one side has {', '.join(sorted(different))}"
            )
        return replace(
            self,
            means=self.means + other.means,
            maxima=torch.maximum(self.maxima, other.maxima),
            histogram=self.histogram + other.histogram,
        )

    @classmethod
    def total(cls, parts: Iterable[MetricSums]) -> MetricSums:
        """The sum of one or more."""
        return reduce(add, parts)

    def with_means(self, means: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> MetricSums:
        """The same and some more {name: (numerator, denominator)}, scalars."""
        more = torch.stack([part.detach().double() for pair in means.values() for part in pair]).view(-1, 2)
        return replace(self, mean_names=self.mean_names + tuple(means), means=torch.cat([self.means, more]))

    def without_means(self, *names: str) -> MetricSums:
        """The same but for some means, that nothing is known of."""
        keep = [at for at, name in enumerate(self.mean_names) if name not in names]
        return replace(
            self,
            mean_names=tuple(self.mean_names[at] for at in keep),
            means=torch.stack([self.means[at] for at in keep]),
        )

    def pairs(self) -> dict[str, torch.Tensor]:
        """{name: [numerator, denominator]}, as Megatron's schedules report losses."""
        return dict(zip(self.mean_names, self.means.unbind(), strict=True))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> MetricSums:
        """Over the ranks of ``group`` (None: all of them), on every rank: one sum and one maximum. Collective."""
        sums = torch.cat([self.means.flatten(), self.histogram.double()])  # counts below 2^53 are exact
        maxima = self.maxima.clone()
        dist.all_reduce(sums, group=group)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        means, histogram = sums.split([self.means.numel(), self.histogram.numel()])
        return replace(self, means=means.view_as(self.means), maxima=maxima, histogram=histogram.long())

    def finalize(self) -> dict[str, float]:
        """What is logged: {name: number}. **Waits for the device.**

        A mean over no tokens is left out. ``dppo/divergence_p99`` is within 3 % for D between 1e-6 and 100 and never above
        ``dppo/divergence_max``. ``mismatch/effective_sample_size`` is (sum r)^2 / (n sum r^2), in (0, 1].
        ``dppo/largest_token_share`` is the largest ``|w r A|`` over the sum of all.
        """
        final = {}
        sums = dict(zip(self.mean_names, self.means.tolist(), strict=True))
        maxima = dict(zip(self.maximum_names, self.maxima.tolist(), strict=True))
        all_updates, largest_update = sums.pop(_UPDATES, (0.0, 0.0))[0], maxima.pop(_LARGEST_UPDATE, 0.0)
        if all_updates > 0:
            final["dppo/largest_token_share"] = largest_update / all_updates
        for name, (numerator, denominator) in sums.items():
            if denominator > 0:
                final[name] = numerator / denominator
        squared_mean = final.pop("mismatch/ratio_squared_mean", None)
        if squared_mean is not None:
            final["mismatch/effective_sample_size"] = final["mismatch/ratio_mean"] ** 2 / squared_mean
        for name, value in maxima.items():
            if value != -math.inf:
                final[name.removesuffix(_NEGATED)] = -value if name.endswith(_NEGATED) else value
        if "dppo/divergence_max" in final:
            final["dppo/divergence_p99"] = min(_percentile(self.histogram, 0.99), final["dppo/divergence_max"])
        return final


def token_metrics(
    advantages: torch.Tensor,
    log_ratio: torch.Tensor,
    ratio: torch.Tensor,
    mu: torch.Tensor,
    pi: torch.Tensor,
    divergence: torch.Tensor,
    weight: torch.Tensor,
    coefficient: torch.Tensor,
    entropy: torch.Tensor,
    mask: torch.Tensor | None,
) -> MetricSums:
    """From [N] vectors, ``coefficient`` being w r A; tokens outside of ``mask`` [N] (None: all inside) count nowhere.

    A token counts as masked by the trust region if its weight is 0. Before a step's first update, ``mismatch/*`` is the
    disagreement of the engine that samples with the one that trains.
    """
    every = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask
    moved, stopped = every & (advantages != 0), weight == 0
    clipped = ppo_clips(advantages, log_ratio, PPO_REFERENCE_CLIP, PPO_REFERENCE_CLIP)
    # r - 1 - log r is a second-order quantity: in fp32 it would drown in the rounding of r, and could come out negative.
    exact_log_ratio = log_ratio.double()
    means = {
        "dppo/mask_fraction": (stopped, moved),
        "dppo/mask_fraction_pos": (stopped, moved & (advantages > 0)),
        "dppo/mask_fraction_neg": (stopped, moved & (advantages < 0)),
        **{
            name: (stopped, moved & (mu >= low) & ((mu < high) | (high == 1.0)))
            for name, (low, high) in zip(
                MASK_FRACTION_OF_BIN, itertools.pairwise(ROLLOUT_PROBABILITY_BINS), strict=True
            )
        },
        "dppo/weight_mean": (weight, moved),
        "dppo/divergence_mean": (divergence, moved),
        "dppo/ppo_would_clip_fraction": (clipped, moved),
        "dppo/ppo_agreement": (clipped == stopped, moved),
        "dppo/bad_update_fraction": ((advantages < 0) & (mu - pi >= BAD_UPDATE_DROP), moved),
        "mismatch/abs_log_ratio": (log_ratio.abs(), every),
        "mismatch/kl_k1": (-log_ratio, every),
        "mismatch/kl_k3": (exact_log_ratio.expm1() - exact_log_ratio, every),
        "mismatch/ratio_mean": (ratio, every),
        "mismatch/ratio_squared_mean": (ratio.square(), every),
        "entropy": (entropy, every),
        _UPDATES: (coefficient.abs(), every),
        LOSS: (-coefficient, every),
    }
    maxima = (
        (divergence, moved),
        (ratio, every),
        (-ratio, every),
        ((pi - mu).abs(), every),
        (coefficient.abs(), every),
    )
    # fp64: sums over many ranks must not lose counts above 2^24.
    where_MN = torch.stack([where for _, where in means.values()])
    values_MN = torch.stack([values.double() for values, _ in means.values()])
    numerators, denominators = values_MN.masked_fill(~where_MN, 0.0).sum(dim=1), where_MN.sum(dim=1).double()
    return MetricSums(
        mean_names=tuple(means),
        means=torch.stack([numerators, denominators], dim=1),
        maximum_names=MAXIMA,
        maxima=torch.stack([_max(values, where) for values, where in maxima]),
        histogram=divergence_histogram(divergence, moved),
    )


def divergence_histogram(divergence: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """[bins + 2] int64 counts of log10(D) over the tokens ``where``; first and last bin take what lies outside."""
    at = ((divergence.double().log10() - HISTOGRAM_LOWEST) * HISTOGRAM_BINS_PER_DECADE).floor() + 1
    # NaN cannot come out of a divergence of finite logits; should it come in, it belongs with the largest.
    at = at.nan_to_num(nan=HISTOGRAM_BINS + 1).clamp(0, HISTOGRAM_BINS + 1).long()
    counts = torch.zeros(HISTOGRAM_BINS + 2, dtype=torch.int64, device=at.device)
    return counts.scatter_add_(0, at, where.long())


def _max(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    if values.shape[0] == 0:
        return values.new_full((), -torch.inf).double()
    return values.masked_fill(~where, -torch.inf).max().double()


def _percentile(histogram: torch.Tensor, fraction: float) -> float:
    cumulative = histogram.cumsum(0)
    at = int(torch.searchsorted(cumulative, math.ceil(fraction * int(cumulative[-1]))))
    if at == 0:
        return 0.0
    if at > HISTOGRAM_BINS:
        return math.inf
    return 10.0 ** (HISTOGRAM_LOWEST + (at - 0.5) / HISTOGRAM_BINS_PER_DECADE)
