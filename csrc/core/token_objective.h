// One token's share of the objective: megatron_dppo/loss/objective.py in single precision, metrics in double. That
// file, and those it calls (divergences, direction, trust_region, metrics), are the definition; the order of operations
// is theirs.
#pragma once

#include "probability.h"
#include "token_objective_arguments.h"

namespace megatron_dppo {

constexpr float kLogRatioClamp = 20.f;  // exp() must not overflow; not a trust region

// Sums over the tokens known under both policies: the top K, and the sampled token where it is not among them.
struct KnownTokens {
  RemainingMass mu_mass, pi_mass;
  float distance = 0.f, kl = 0.f, cross = 0.f, square = 0.f;
  int64_t count = 0;

  DPPO_HOST_DEVICE void add(float log_mu, float log_pi) {
    const float mu = expf(log_mu), pi = expf(log_pi);
    mu_mass.add(log_mu, mu);
    pi_mass.add(log_pi, pi);
    distance += fabsf(mu - pi);
    kl += mu * (nan_max(log_mu, kLogZero) - nan_max(log_pi, kLogZero));
    cross += pi * mu;
    square += pi * pi;
    ++count;
  }
};

DPPO_HOST_DEVICE float sampled_log_mu(const TokenObjectiveArguments& args, int64_t i) {
  return nan_min(args.log_mu[i], 0.f);
}

DPPO_HOST_DEVICE KnownTokens known_tokens(const TokenObjectiveArguments& args, int64_t i) {
  KnownTokens known;
  bool sampled_is_known = false;
  for (int64_t k = i * args.topk; k < (i + 1) * args.topk; ++k) {
    known.add(nan_min(args.topk_log_mu[k], 0.f), args.topk_log_pi[k]);
    sampled_is_known = sampled_is_known || args.topk_ids[k] == args.target[i];
  }
  if (!sampled_is_known) known.add(sampled_log_mu(args, i), args.log_pi[i]);
  return known;
}

DPPO_HOST_DEVICE float divergence_of(const TokenObjectiveArguments& args, int64_t i, const KnownTokens& known) {
  const float log_mu = sampled_log_mu(args, i), log_pi = args.log_pi[i];
  switch (args.settings.divergence) {
    case Divergence::kBinaryTv:
      return fabsf(expf(log_mu) - expf(log_pi));
    case Divergence::kBinaryKl: {
      const float sampled = expf(log_mu) * (log_mu - nan_max(log_pi, kLogZero));
      const float other = -expm1f(log_mu) * (log1mexp(log_mu) - log1mexp(log_pi));
      return nan_max(sampled + other, 0.f);
    }
    case Divergence::kTopkTv:
      return 0.5f * (known.distance + fabsf(known.mu_mass.left() - known.pi_mass.left()));
    case Divergence::kTopkKl: {
      const float mu_other = known.mu_mass.left(), pi_other = known.pi_mass.left();
      const float log_quotient = logf(nan_max(mu_other, kSmallestNormal)) - logf(nan_max(pi_other, kSmallestNormal));
      return nan_max(known.kl + mu_other * log_quotient, 0.f);
    }
    case Divergence::kGiven:
      return args.given_divergence[i];
  }
  return NAN;
}

DPPO_HOST_DEVICE float sign_of(float x) { return x > 0.f ? 1.f : (x < 0.f ? -1.f : 0.f * x); }

// Sign of the change of KL(mu || pi) to first order, but for the advantage's: see loss/trust_region.py.
DPPO_HOST_DEVICE float divergence_growth(const TokenObjectiveArguments& args, int64_t i, const KnownTokens& known) {
  const float mu_other = known.mu_mass.left(), pi_other = known.pi_mass.left();
  float other_square, other_cross;
  if (args.settings.direction == Direction::kExactCollision) {
    other_square = nan_min(nan_max(args.collision[i] - known.square, 0.f), pi_other * pi_other);
    other_cross = mu_other * (other_square / nan_max(pi_other, kSmallestNormal));
  } else {
    const int64_t others = args.vocab_size > known.count ? args.vocab_size - known.count : 1;
    const float spread = args.settings.direction == Direction::kUniformTail ? static_cast<float>(others) : 1.f;
    other_square = pi_other * pi_other / spread;
    other_cross = pi_other * mu_other / spread;
  }
  const float change = (expf(args.log_pi[i]) - expf(sampled_log_mu(args, i))) + (known.cross + other_cross) -
                       (known.square + other_square);
  return sign_of(change);
}

DPPO_HOST_DEVICE bool ppo_clips(float advantage, float log_ratio, float log_low, float log_high) {
  return (advantage > 0.f && log_ratio > log_high) || (advantage < 0.f && log_ratio < log_low);
}

DPPO_HOST_DEVICE float weight_of(const TrustRegionSettings& settings, float advantage, float log_ratio, float ratio,
                                 float probability_change, float divergence, float outward) {
  const Limits& limits = settings.limits;
  const float delta = advantage > 0.f ? limits.delta_high : limits.delta_low;
  switch (settings.trust_region) {
    case TrustRegion::kMask:
      return outward > 0.f && divergence > delta ? 0.f : 1.f;
    case TrustRegion::kSmooth:
      return 1.f - outward * fabsf(probability_change) / delta;
    case TrustRegion::kPpoClip:
      return ppo_clips(advantage, log_ratio, limits.log_clip_low, limits.log_clip_high) ||
                     (advantage < 0.f && log_ratio > limits.log_dual_clip)
                 ? 0.f
                 : 1.f;
    case TrustRegion::kCispo:
      return nan_min(nan_max(ratio, limits.cispo_ratio_min), limits.cispo_ratio_max) / ratio;
    case TrustRegion::kNone:
      return 1.f;
  }
  return NAN;
}

DPPO_HOST_DEVICE double maximum(double a, double b) { return b > a || b != b ? b : a; }
DPPO_HOST_DEVICE double combine_totals(int which, double a, double b) {
  return which < kNumSums ? a + b : maximum(a, b);
}
DPPO_HOST_DEVICE double empty_total(int which) { return which < kNumSums ? 0.0 : -INFINITY; }

// Writes one of the totals to wherever it is reported.
DPPO_HOST_DEVICE void report_total(const TokenObjectiveArguments& args, int which, double total) {
  int mean = 0;
#define DPPO_REPORT(name, numerator, denominator)               \
  if (which == (numerator)) args.means[2 * mean] = total;       \
  if (which == (denominator)) args.means[2 * mean + 1] = total; \
  ++mean;
  DPPO_MEANS(DPPO_REPORT)
#undef DPPO_REPORT
  if (which >= kNumSums) args.maxima[which - kNumSums] = total;
  if (which == kLossSum) *args.loss = static_cast<float>(total);
  if (which == kTokens) *args.tokens = static_cast<int64_t>(total);
}

// Bin of a divergence; NaN belongs with the largest.
DPPO_HOST_DEVICE int histogram_bin(float divergence) {
  const double decades = log10(static_cast<double>(divergence)) - kHistogramLowest;
  const double at = floor(decades * kHistogramBinsPerDecade) + 1.0;
  if (at <= 0.0) return 0;
  return at <= kHistogramBins ? static_cast<int>(at) : kHistogramBins + 1;
}

// What is decided about one token, and from what.
struct TokenDecision {
  float log_ratio, ratio, mu, pi;
  float divergence, weight, coefficient;
};

// Of a token of the mask.
DPPO_HOST_DEVICE TokenDecision decide_token(const TokenObjectiveArguments& args, int64_t i) {
  const float advantage = args.advantage[i], log_mu = sampled_log_mu(args, i), log_pi = args.log_pi[i];
  const float log_ratio = log_pi - log_mu;
  const float ratio = expf(nan_min(nan_max(log_ratio, -kLogRatioClamp), kLogRatioClamp));
  const float capped_ratio = nan_min(ratio, args.settings.limits.ratio_cap);
  const float mu = expf(log_mu), pi = expf(log_pi);

  const Direction direction = args.settings.direction;
  const bool predicts = direction != Direction::kRatio && direction != Direction::kSymmetric;
  const bool reads_known =
      predicts || args.settings.divergence == Divergence::kTopkTv || args.settings.divergence == Divergence::kTopkKl;
  const KnownTokens known = reads_known ? known_tokens(args, i) : KnownTokens();
  const float divergence = divergence_of(args, i, known);
  const float growth = predicts ? divergence_growth(args, i, known) : sign_of(log_ratio);
  const float outward = direction == Direction::kSymmetric ? 1.f : sign_of(advantage) * growth;
  const float weight = weight_of(args.settings, advantage, log_ratio, capped_ratio, pi - mu, divergence, outward);
  return {log_ratio, ratio, mu, pi, divergence, weight, weight * capped_ratio * advantage};
}

// Writes token i's results, adds what it contributes to `totals`, and returns its histogram bin, or -1 without one.
DPPO_HOST_DEVICE int add_token(const TokenObjectiveArguments& args, int64_t i, double* totals) {
  if (args.mask.skips(i)) {
    args.coefficient[i] = args.weight[i] = args.divergence[i] = 0.f;
    return -1;
  }
  const float advantage = args.advantage[i];
  const auto [log_ratio, ratio, mu, pi, divergence, weight, coefficient] = decide_token(args, i);
  args.coefficient[i] = coefficient;
  args.weight[i] = weight;
  args.divergence[i] = divergence;

  totals[kTokens] += 1.0;
  totals[kAbsLogRatioSum] += fabsf(log_ratio);
  totals[kK1Sum] -= log_ratio;
  // r - 1 - log r is of second order: in single precision it would drown in the rounding of r.
  totals[kK3Sum] += expm1(static_cast<double>(log_ratio)) - log_ratio;
  totals[kRatioSum] += ratio;
  totals[kRatioSquaredSum] += ratio * ratio;
  totals[kEntropySum] += args.entropy[i];
  totals[kUpdateSum] += fabsf(coefficient);
  totals[kLossSum] -= coefficient;
  totals[kRatioMax] = maximum(totals[kRatioMax], ratio);
  totals[kNegatedRatioMax] = maximum(totals[kNegatedRatioMax], -ratio);
  totals[kProbChangeMax] = maximum(totals[kProbChangeMax], fabsf(pi - mu));
  totals[kUpdateMax] = maximum(totals[kUpdateMax], fabsf(coefficient));
  if (advantage == 0.f) return -1;

  const double masked = weight == 0.f ? 1.0 : 0.0;
  const bool clips = ppo_clips(advantage, log_ratio, kReferenceLogClipLow, kReferenceLogClipHigh);
  totals[kMoved] += 1.0;
  totals[kMasked] += masked;
  totals[advantage > 0.f ? kPositive : kNegative] += 1.0;
  totals[advantage > 0.f ? kMaskedPositive : kMaskedNegative] += masked;
  const int bin = probability_bin(mu);
  if (bin >= 0) {
    totals[kMovedInBin0 + bin] += 1.0;
    totals[kMaskedInBin0 + bin] += masked;
  }
  totals[kWeightSum] += weight;
  totals[kDivergenceSum] += divergence;
  totals[kPpoClipped] += clips ? 1.0 : 0.0;
  totals[kPpoAgreeing] += clips == (weight == 0.f) ? 1.0 : 0.0;
  totals[kBadUpdates] += advantage < 0.f && mu - pi >= static_cast<float>(kBadUpdateDrop) ? 1.0 : 0.0;
  totals[kDivergenceMax] = maximum(totals[kDivergenceMax], divergence);
  return histogram_bin(divergence);
}

}  // namespace megatron_dppo
