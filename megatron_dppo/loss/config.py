"""What is optimised, as one frozen dataclass. Every default of the loss is set here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_dppo.errors import ConfigError

DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl", "exact_tv", "exact_kl")
DIRECTIONS = ("ratio", "predictive", "symmetric")
PREDICTIVE_ESTIMATORS = ("exact_collision", "aggregated_tail", "uniform_tail")
TRUST_REGIONS = ("mask", "smooth", "ppo_clip", "cispo", "none")
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm")
KL_ESTIMATORS = ("k1", "k2", "k3")

# Thresholds live on their divergence's scale; total variation and KL differ three- to fourfold.
_DEFAULT_DELTA = {"tv": 0.15, "kl": 0.05}
_DEFAULT_SMOOTH_DELTA = 12.5

# field -> (the field that decides whether it is read, the values with which it is)
_READ_BY = {
    "delta_low": ("trust_region", ("mask", "smooth")),
    "delta_high": ("trust_region", ("mask", "smooth")),
    "direction": ("trust_region", ("mask", "smooth")),
    "predictive_estimator": ("direction", ("predictive",)),
    "horizon": ("aggregation", ("seq_mean_token_sum_norm",)),
    "ppo_clip_low": ("trust_region", ("ppo_clip",)),
    "ppo_clip_high": ("trust_region", ("ppo_clip",)),
    "ppo_dual_clip": ("trust_region", ("ppo_clip",)),
    "cispo_ratio_min": ("trust_region", ("cispo",)),
    "cispo_ratio_max": ("trust_region", ("cispo",)),
}


@dataclass(frozen=True, kw_only=True)
class DPPOConfig:
    """The DPPO objective (arXiv 2602.04879, Eq. 11-12), its variants and the baselines to compare with.

    Usable as an OmegaConf structured config. A field that the chosen rule does not read is refused when it is set: it would
    promise something that does not happen.

    Attributes:
        divergence: D(mu || pi) per token: binary_tv | binary_kl | topk_tv | topk_kl | exact_tv | exact_kl. ``topk_*``
            needs the engine's top-K log-probs, ``exact_*`` the rollout policy's logits.
        delta_low: threshold for tokens with a negative advantage. None: the divergence's default (TV 0.15, KL 0.05), or
            12.5 with ``trust_region="smooth"``.
        delta_high: the same for a positive advantage.
        direction: when an update counts as leaving the trust region. ratio: it moves the sampled token's ratio further
            from 1 (2602.04879); predictive: it raises KL(mu || pi) to first order (2607.10848); symmetric: always, also
            where it would lead back: a baseline to compare with. Read by mask and smooth.
        predictive_estimator: how ``predictive`` fills in what the engine did not report: exact_collision |
            aggregated_tail | uniform_tail (see ``loss/trust_region.py``).
        trust_region: mask (DPPO) | smooth (DRPO, 2606.09821) | ppo_clip | cispo | none. The last three are baselines
            and read no delta and no direction; the divergence is still measured.
        aggregation: token_mean | seq_mean_token_mean | seq_mean_token_sum_norm (divides by ``horizon``).
        horizon: fixed length that seq_mean_token_sum_norm divides by; required there.
        temperature: the sampling temperature, under which all log-probs are taken.
        ratio_cap: upper bound on the ratio in the gradient. None (the paper's advice, 5.4): no cap.
        ppo_clip_low: ppo_clip keeps ratios above ``1 - ppo_clip_low`` where A < 0.
        ppo_clip_high: and below ``1 + ppo_clip_high`` where A > 0.
        ppo_dual_clip: with A < 0, ratios above this stop counting too. None: off.
        cispo_ratio_min: cispo clamps the ratio in the gradient from below ...
        cispo_ratio_max: ... and above, and masks nothing.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of the KL to a reference policy, which needs ``ref_log_probs``.
        kl_estimator: k1 | k2 | k3 (see ``loss/regularisers.py`` for value and gradient of each).
    """

    divergence: str = "binary_tv"
    delta_low: float | None = None
    delta_high: float | None = None
    direction: str = "ratio"
    predictive_estimator: str = "exact_collision"
    trust_region: str = "mask"
    aggregation: str = "token_mean"
    horizon: int | None = None
    temperature: float = 1.0
    ratio_cap: float | None = None
    ppo_clip_low: float = 0.2
    ppo_clip_high: float = 0.28
    ppo_dual_clip: float | None = None
    cispo_ratio_min: float = 0.0
    cispo_ratio_max: float = 5.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"

    def __post_init__(self) -> None:
        _check_choice("divergence", self.divergence, DIVERGENCES)
        _check_choice("direction", self.direction, DIRECTIONS)
        _check_choice("predictive_estimator", self.predictive_estimator, PREDICTIVE_ESTIMATORS)
        _check_choice("trust_region", self.trust_region, TRUST_REGIONS)
        _check_choice("aggregation", self.aggregation, AGGREGATIONS)
        _check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        for name in ("delta_low", "delta_high", "ratio_cap", "horizon"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), above=0.0)
        _check_range("temperature", self.temperature, above=0.0)
        _check_range("ppo_clip_low", self.ppo_clip_low, above=0.0, below=1.0)
        _check_range("ppo_clip_high", self.ppo_clip_high, above=0.0)
        if self.ppo_dual_clip is not None:
            _check_range("ppo_dual_clip", self.ppo_dual_clip, above=1.0)
        _check_range("cispo_ratio_max", self.cispo_ratio_max, above=0.0)
        _check_range("cispo_ratio_min", self.cispo_ratio_min, at_least=0.0, below=self.cispo_ratio_max)
        _check_range("entropy_coef", self.entropy_coef, at_least=0.0)
        _check_range("kl_coef", self.kl_coef, at_least=0.0)
        if self.aggregation == "seq_mean_token_sum_norm" and self.horizon is None:
            raise ConfigError("DPPOConfig.horizon must be set for aggregation='seq_mean_token_sum_norm'")
        self._refuse_unread_fields()

    def _refuse_unread_fields(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, (chooser, readers) in _READ_BY.items():
            chosen = getattr(self, chooser)
            if chosen not in readers and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"DPPOConfig.{name}={getattr(self, name)!r} is not read with {chooser}={chosen!r}, only with "
                    f"{' or '.join(map(repr, readers))}: leave it at {defaults[name]!r}, or choose one of those"
                )

    @property
    def partition(self) -> str:
        """How finely the divergence sees the vocabulary: binary | topk | exact."""
        return self.divergence.partition("_")[0]

    @property
    def kind(self) -> str:
        """Which distance: tv | kl."""
        return self.divergence.partition("_")[2]

    @property
    def needs_topk(self) -> bool:
        """Whether the engine has to return top-K log-probs. (predictive works without, on the sampled token alone.)"""
        return self.partition == "topk" or self.direction == "predictive"

    @property
    def reads_topk(self) -> bool:
        """Whether top-K log-probs make a difference, if there are any."""
        return self.needs_topk or self.partition == "exact"

    @property
    def needs_rollout_logits(self) -> bool:
        """Whether the rollout policy's logits have to be recomputed."""
        return self.partition == "exact"

    @property
    def thresholds(self) -> tuple[float, float]:
        """``(delta_low, delta_high)`` in force."""
        if self.trust_region == "smooth":
            default = _DEFAULT_SMOOTH_DELTA
        else:
            default = _DEFAULT_DELTA[self.kind]
        low, high = self.delta_low, self.delta_high
        return (default if low is None else low, default if high is None else high)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"DPPOConfig.{name} must be one of {', '.join(choices)}, not {value!r}")


def _check_range(
    name: str, value: float, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (above < value < below and value >= at_least):
        lower = f"above {above}" if at_least == -math.inf else f"at least {at_least}"
        upper = " and finite" if below == math.inf else f" and below {below}"
        raise ConfigError(f"DPPOConfig.{name} must be a number {lower}{upper}, not {value!r}")
