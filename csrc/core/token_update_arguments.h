// Arguments of the token-update kernel, the same for CPU and CUDA. Pointers are to memory of the kernel's device.
#pragma once

#include <cstdint>

namespace megatron_dppo {

enum class Divergence : int { kBinaryTv, kBinaryKl, kTopkTv, kTopkKl, kGiven };
enum class Direction : int { kRatio, kExactCollision, kAggregatedTail, kUniformTail };
enum class TrustRegion : int { kMask, kSmooth, kPpoClip, kCispo, kNone };

constexpr int kProbabilityBins = 5;
constexpr int kMaxHistogramBins = 1024;

// What is summed (below kNumSums) or maximised over tokens, in the order of the operator's result. A token has moved if
// its advantage is not 0, and is masked if its weight is 0.
enum UpdateTotal : int {
  kMoved,
  kPositive,
  kNegative,
  kMovedInBin,  // one for each bin of mu
  kMasked = kMovedInBin + kProbabilityBins,
  kMaskedPositive,
  kMaskedNegative,
  kMaskedInBin,
  kWeightSum = kMaskedInBin + kProbabilityBins,
  kDivergenceSum,
  kPpoClips,
  kPpoAgrees,
  kBadUpdates,
  kAbsLogRatio,
  kK1,
  kK3,
  kRatioSum,
  kRatioSquared,
  kEntropySum,
  kNumSums,
  kDivergenceMax = kNumSums,
  kRatioMax,
  kNegatedRatioMax,
  kProbabilityChangeMax,
  kNumTotals
};

// What DPPOConfig says, thresholds on the ratio as logarithms.
struct TrustRegionSettings {
  Divergence divergence;
  Direction direction;
  TrustRegion trust_region;
  float delta_low, delta_high;
  float ratio_cap;                    // infinity: none
  float log_clip_low, log_clip_high;  // PPO drops A < 0 below the one, A > 0 above the other ...
  float log_dual_clip;                // ... and A < 0 above this; infinity: never
  float cispo_ratio_min, cispo_ratio_max;
};

// What the metrics are measured against, whatever the trust region.
struct MetricSettings {
  float log_clip_low, log_clip_high;        // of the PPO to compare with
  float bad_update_drop;                    // of mu - pi
  float bin_edges[kProbabilityBins + 1];    // of mu; the last bin has no upper end
  float histogram_lowest, bins_per_decade;  // of log10(D)
  int histogram_bins;                       // and one more at either end for what lies outside
};

struct TokenUpdateArguments {
  int64_t n, topk, vocab_size;
  const float* log_mu;            // [n] rollout policy
  const float* log_pi;            // [n] policy being trained
  const float* advantage;         // [n]
  const float* entropy;           // [n]
  const float* collision;         // [n]
  const int64_t* target;          // [n]
  const int64_t* topk_ids;        // [n, topk]
  const float* topk_log_mu;       // [n, topk]
  const float* topk_log_pi;       // [n, topk]
  const float* given_divergence;  // [n], for Divergence::kGiven
  TrustRegionSettings settings;
  MetricSettings metrics;
  float* coefficient;  // [n]  OUT  w r A
  float* weight;       // [n]  OUT  w
  float* divergence;   // [n]  OUT  D(mu || pi)
  double* totals;      // [kNumTotals]  OUT
  int64_t* histogram;  // [histogram_bins + 2]  OUT
};

}  // namespace megatron_dppo
