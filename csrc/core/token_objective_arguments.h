// Arguments and results of the token-objective kernel, the same for CPU and CUDA. Pointers are to memory of the
// kernel's device.
#pragma once

#include <cmath>
#include <cstdint>

#include "arguments.h"
#include "metric_constants.h"

namespace megatron_dppo {

enum class Divergence : int { kBinaryTv, kBinaryKl, kTopkTv, kTopkKl, kGiven };
enum class Direction : int { kRatio, kExactCollision, kAggregatedTail, kUniformTail, kSymmetric };
enum class TrustRegion : int { kMask, kSmooth, kPpoClip, kCispo, kNone };

// The operator's `limits`, in order: X(name, field of Limits, the field from the name's `value`). The kernel compares
// ratios as logarithms. Infinity as ratio_cap or ppo_dual_clip: never.
#define DPPO_LIMITS(X)                               \
  X(delta_low, delta_low, value)                     \
  X(delta_high, delta_high, value)                   \
  X(ratio_cap, ratio_cap, value)                     \
  X(ppo_clip_low, log_clip_low, std::log1p(-value))  \
  X(ppo_clip_high, log_clip_high, std::log1p(value)) \
  X(ppo_dual_clip, log_dual_clip, std::log(value))   \
  X(cispo_ratio_min, cispo_ratio_min, value)         \
  X(cispo_ratio_max, cispo_ratio_max, value)

struct Limits {
#define DPPO_FIELD(name, field, expression) float field;
  DPPO_LIMITS(DPPO_FIELD)
#undef DPPO_FIELD
};

#define DPPO_NAME(name, field, expression) #name,
constexpr const char* kLimitNames[] = {DPPO_LIMITS(DPPO_NAME)};
#undef DPPO_NAME
constexpr int kNumLimits = sizeof(kLimitNames) / sizeof(*kLimitNames);

// `values`: kNumLimits of them.
inline Limits limits_from(const double* values) {
  Limits limits;
#define DPPO_ASSIGN(name, field, expression)       \
  {                                                \
    const double value = *values++;                \
    limits.field = static_cast<float>(expression); \
  }
  DPPO_LIMITS(DPPO_ASSIGN)
#undef DPPO_ASSIGN
  return limits;
}

// What is added up over the tokens of the mask, then what is maximised, in the order of the operator's `totals`:
// X(enumerator, name). A token has moved if its advantage is not 0, and is masked if its weight is 0.
#define DPPO_PER_BIN(X, enumerator, name) \
  X(enumerator##0, name "_0")             \
  X(enumerator##1, name "_1")             \
  X(enumerator##2, name "_2")             \
  X(enumerator##3, name "_3")             \
  X(enumerator##4, name "_4")
#define DPPO_SUMS(X)                             \
  /* numbers of tokens */                        \
  X(kTokens, "tokens")                           \
  X(kMoved, "moved")                             \
  X(kPositive, "positive")                       \
  X(kNegative, "negative")                       \
  DPPO_PER_BIN(X, kMovedInBin, "moved_in_bin")   \
  X(kMasked, "masked")                           \
  X(kMaskedPositive, "masked_positive")          \
  X(kMaskedNegative, "masked_negative")          \
  DPPO_PER_BIN(X, kMaskedInBin, "masked_in_bin") \
  X(kPpoClipped, "ppo_clipped")                  \
  X(kPpoAgreeing, "ppo_agreeing")                \
  X(kBadUpdates, "bad_updates")                  \
  /* sums over the tokens that have moved */     \
  X(kWeightSum, "weight_sum")                    \
  X(kDivergenceSum, "divergence_sum")            \
  /* sums over all tokens */                     \
  X(kAbsLogRatioSum, "abs_log_ratio_sum")        \
  X(kK1Sum, "kl_k1_sum")                         \
  X(kK3Sum, "kl_k3_sum")                         \
  X(kRatioSum, "ratio_sum")                      \
  X(kRatioSquaredSum, "ratio_squared_sum")       \
  X(kEntropySum, "entropy_sum")
#define DPPO_MAXIMA(X)                     \
  X(kDivergenceMax, "divergence_max")      \
  X(kRatioMax, "ratio_max")                \
  X(kNegatedRatioMax, "negated_ratio_max") \
  X(kProbChangeMax, "prob_change_max")

enum Total : int {
#define DPPO_ENUMERATOR(enumerator, name) enumerator,
  DPPO_SUMS(DPPO_ENUMERATOR) kNumSums,
  kLastSum = kNumSums - 1,
  DPPO_MAXIMA(DPPO_ENUMERATOR) kNumTotals
#undef DPPO_ENUMERATOR
};

#define DPPO_NAME(enumerator, name) name,
constexpr const char* kTotalNames[] = {DPPO_SUMS(DPPO_NAME) DPPO_MAXIMA(DPPO_NAME)};
#undef DPPO_NAME
static_assert(sizeof(kTotalNames) / sizeof(*kTotalNames) == kNumTotals, "a name for every total");
static_assert(kMovedInBin0 + kProbabilityBins == kMasked && kMaskedInBin0 + kProbabilityBins == kPpoClipped,
              "DPPO_PER_BIN has as many lines as there are bins");

struct TrustRegionSettings {
  Divergence divergence;
  Direction direction;
  TrustRegion trust_region;
  Limits limits;
};

struct TokenObjectiveArguments {
  int64_t n, topk, vocab_size;
  const float* log_mu;            // [n] rollout policy
  const float* log_pi;            // [n] policy being trained
  const float* advantage;         // [n]
  const float* entropy;           // [n]
  const float* collision;         // [n]
  const int64_t* target;          // [n]
  RowMask mask;                   // [n] tokens outside are not looked at: their results are 0, and no total has them
  const int64_t* topk_ids;        // [n, topk]; with topk = 0 nothing but the sampled token is known
  const float* topk_log_mu;       // [n, topk]
  const float* topk_log_pi;       // [n, topk]
  const float* given_divergence;  // [n], for Divergence::kGiven
  TrustRegionSettings settings;
  float* coefficient;  // [n]  OUT  w r A
  float* weight;       // [n]  OUT  w
  float* divergence;   // [n]  OUT  D(mu || pi)
  double* totals;      // [kNumTotals]  OUT
  int64_t* histogram;  // [kHistogramSize]  OUT  of log10(D) of the tokens that have moved
};

}  // namespace megatron_dppo
