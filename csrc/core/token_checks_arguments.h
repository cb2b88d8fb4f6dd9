// Arguments and results of the kernel that looks for impossible values in the loss's inputs, the same for CPU and CUDA.
// Pointers are to memory of the kernel's device.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace megatron_dppo {

// What is asked of every token of the mask, in the order of the operator's `record`: X(enumerator, name).
#define DPPO_TOKEN_CHECKS(X)           \
  X(kTargetInVocabulary, "target")     \
  X(kAdvantageFinite, "advantages")    \
  X(kLogMuPossible, "log_mu")          \
  X(kTopkIdsInVocabulary, "topk_ids")  \
  X(kTopkLogMuPossible, "topk_log_mu") \
  X(kTopkMassPossible, "topk_mass")    \
  X(kReferenceLogProbFinite, "ref_log_prob")

enum TokenCheck : int {
#define DPPO_ENUMERATOR(enumerator, name) enumerator,
  DPPO_TOKEN_CHECKS(DPPO_ENUMERATOR) kNumTokenChecks
#undef DPPO_ENUMERATOR
};
#define DPPO_NAME(enumerator, name) name,
constexpr const char* kTokenCheckNames[] = {DPPO_TOKEN_CHECKS(DPPO_NAME)};
#undef DPPO_NAME

// Of the CUDA kernel: how far from the end each check's first bad token is, and a counter of finished blocks.
constexpr int64_t kTokenChecksWorkspaceBytes = kNumTokenChecks * sizeof(unsigned long long) + sizeof(unsigned);

struct TokenChecksArguments {
  int64_t n, topk, vocab_size;
  const int64_t* target;      // [n]
  const float* advantage;     // [n]
  const float* log_mu;        // [n]
  RowMask mask;               // [n]
  const int64_t* topk_ids;    // [n, topk]
  const float* topk_log_mu;   // [n, topk]
  const float* ref_log_prob;  // [n], or null: none
  float log_prob_tolerance;   // how far rounding may put a log-prob above 0
  double mass_tolerance;      // and the sum of the top K above 1
  double* record;             // [kNumTokenChecks, 3]  OUT  the first bad token's position or -1, its value, its target
};

}  // namespace megatron_dppo
