// Small pieces of log-probability arithmetic that stay accurate, and finite, at certainty:
// megatron_dppo/ops/probability.py in single precision. NaN in, NaN out, everywhere.
#pragma once

#include "platform.h"

namespace megatron_dppo {

// Stands in for log(0). Far below any log-prob that real logits produce, yet finite: 0 * kLogZero is 0, not NaN.
constexpr float kLogZero = -1e5f;
constexpr float kSmallestNormal = 0x1p-126f;
constexpr float kLogSmallestNormal = -87.3365447505531f;
constexpr float kEpsilon = 0x1p-23f;

// log(1 - exp(log_p)) for log_p <= 0, accurate at both ends; at p = 1, log of the smallest normal number. Maechler,
// "Accurately computing log(1 - exp(-|a|))": which of the two forms keeps its digits changes at p = 1/2.
DPPO_HOST_DEVICE float log1mexp(float log_p) {
  const float value = log_p > -0.693147181f ? logf(-expm1f(log_p)) : log1pf(-expf(log_p));
  return nan_max(value, kLogSmallestNormal);
}

// Probability that the added tokens leave over: 1 - sum of theirs, never negative. The largest is taken through expm1,
// so that a peaked row keeps the digits of a small rest. What the others' rounding hides is not called 0: there would
// then be no bound on a KL that divides by it.
struct RemainingMass {
  float largest_log_p = -INFINITY, largest = 0.f, others = 0.f;

  DPPO_HOST_DEVICE void add(float log_p, float p) {
    const bool leads = log_p > largest_log_p;
    others += leads ? largest : p;
    largest = leads ? p : largest;
    largest_log_p = leads ? log_p : largest_log_p;
  }
  DPPO_HOST_DEVICE float left() const { return nan_max(-expm1f(largest_log_p) - others, kEpsilon * others); }
};

}  // namespace megatron_dppo
