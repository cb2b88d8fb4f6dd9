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

// What is added up over the tokens of the mask, then what is maximised: X(enumerator, name). A token has moved if its
// advantage is not 0, and is masked if its weight is 0.
#define DPPO_PER_BIN(X, enumerator) X(enumerator##0) X(enumerator##1) X(enumerator##2) X(enumerator##3) X(enumerator##4)
#define DPPO_SUMS(X)            \
  /* numbers of tokens */       \
  X(kTokens)                    \
  X(kMoved)                     \
  X(kPositive)                  \
  X(kNegative)                  \
  DPPO_PER_BIN(X, kMovedInBin)  \
  X(kMasked)                    \
  X(kMaskedPositive)            \
  X(kMaskedNegative)            \
  DPPO_PER_BIN(X, kMaskedInBin) \
  X(kPpoClipped)                \
  X(kPpoAgreeing)               \
  X(kBadUpdates)                \
  /* sums over moved tokens */  \
  X(kWeightSum)                 \
  X(kDivergenceSum)             \
  /* sums over all tokens */    \
  X(kAbsLogRatioSum)            \
  X(kK1Sum)                     \
  X(kK3Sum)                     \
  X(kRatioSum)                  \
  X(kRatioSquaredSum)           \
  X(kEntropySum)                \
  X(kUpdateSum)                 \
  X(kLossSum)
#define DPPO_MAXIMA(X)                     \
  X(kDivergenceMax, "divergence_max")      \
  X(kRatioMax, "ratio_max")                \
  X(kNegatedRatioMax, "negated_ratio_max") \
  X(kProbChangeMax, "prob_change_max")     \
  X(kUpdateMax, "update_max")

// The operator's `means`, in order: X(name, numerator, denominator).
#define DPPO_MEANS(X)                                      \
  X("mask_fraction", kMasked, kMoved)                      \
  X("mask_fraction_pos", kMaskedPositive, kPositive)       \
  X("mask_fraction_neg", kMaskedNegative, kNegative)       \
  X("mask_fraction_of_bin_0", kMaskedInBin0, kMovedInBin0) \
  X("mask_fraction_of_bin_1", kMaskedInBin1, kMovedInBin1) \
  X("mask_fraction_of_bin_2", kMaskedInBin2, kMovedInBin2) \
  X("mask_fraction_of_bin_3", kMaskedInBin3, kMovedInBin3) \
  X("mask_fraction_of_bin_4", kMaskedInBin4, kMovedInBin4) \
  X("weight_mean", kWeightSum, kMoved)                     \
  X("divergence_mean", kDivergenceSum, kMoved)             \
  X("ppo_would_clip_fraction", kPpoClipped, kMoved)        \
  X("ppo_agreement", kPpoAgreeing, kMoved)                 \
  X("bad_update_fraction", kBadUpdates, kMoved)            \
  X("abs_log_ratio", kAbsLogRatioSum, kTokens)             \
  X("kl_k1", kK1Sum, kTokens)                              \
  X("kl_k3", kK3Sum, kTokens)                              \
  X("ratio_mean", kRatioSum, kTokens)                      \
  X("ratio_squared_mean", kRatioSquaredSum, kTokens)       \
  X("entropy", kEntropySum, kTokens)                       \
  X("update_mean", kUpdateSum, kTokens)                    \
  X("loss", kLossSum, kTokens)

enum Total : int {
#define DPPO_ENUMERATOR(enumerator, ...) enumerator,
  DPPO_SUMS(DPPO_ENUMERATOR) kNumSums,
  kLastSum = kNumSums - 1,
  DPPO_MAXIMA(DPPO_ENUMERATOR) kNumTotals
#undef DPPO_ENUMERATOR
};
static_assert(kMovedInBin0 + kProbabilityBins == kMasked && kMaskedInBin0 + kProbabilityBins == kPpoClipped,
              "DPPO_PER_BIN has as many lines as there are bins");

#define DPPO_NAME(name, numerator, denominator) name,
constexpr const char* kMeanNames[] = {DPPO_MEANS(DPPO_NAME)};
#undef DPPO_NAME
#define DPPO_NAME(enumerator, name) name,
constexpr const char* kMaximumNames[] = {DPPO_MAXIMA(DPPO_NAME)};
#undef DPPO_NAME
constexpr int kNumMeans = sizeof(kMeanNames) / sizeof(*kMeanNames);
constexpr int kNumMaxima = kNumTotals - kNumSums;
static_assert(sizeof(kMaximumNames) / sizeof(*kMaximumNames) == kNumMaxima, "a name for every maximum");

struct TrustRegionSettings {
  Divergence divergence;
  Direction direction;
  TrustRegion trust_region;
  Limits limits;
};

struct TokenObjectiveArguments {
  int64_t n, topk, vocab_size;
  const float* log_mu;            // [n] rollout policy; what rounding put above 0 is taken as 0, also in the top K
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
  double* means;       // [kNumMeans, 2]  OUT  numerators and denominators
  double* maxima;      // [kNumMaxima]  OUT  -inf over no tokens
  int64_t* histogram;  // [kHistogramSize]  OUT  of log10(D) of the tokens that have moved
  float* loss;         // [1]  OUT  the sum of -w r A
  int64_t* tokens;     // [1]  OUT  how many are in the mask
};

}  // namespace megatron_dppo
