// What the metrics are measured against, whatever the trust region: megatron_dppo/loss/metrics.py has the same numbers,
// and Python refuses an extension that was built with others (metric_constants of megatron_dppo._C).
#pragma once

#include "platform.h"

namespace megatron_dppo {

// log(1 + x) for |x| <= 1/2, at compile time (std::log1p is not constexpr): 2 artanh(x / (2 + x)).
constexpr double constant_log1p(double x) {
  const double y = x / (2.0 + x);
  double power = y, sum = 0.0;
  for (int k = 1; k < 40; k += 2, power *= y * y) sum += power / k;
  return 2.0 * sum;
}

constexpr double kReferenceClip = 0.2;  // of the PPO to compare with
constexpr float kReferenceLogClipLow = static_cast<float>(constant_log1p(-kReferenceClip));
constexpr float kReferenceLogClipHigh = static_cast<float>(constant_log1p(kReferenceClip));

constexpr double kBadUpdateDrop = 0.5;  // of mu - pi, where A < 0

// Powers of ten between which the histogram of D has bins; one bin more at either end takes what lies outside.
constexpr int kHistogramLowest = -6, kHistogramHighest = 2;
constexpr int kHistogramBinsPerDecade = 40;
constexpr int kHistogramBins = kHistogramBinsPerDecade * (kHistogramHighest - kHistogramLowest);
constexpr int kHistogramSize = kHistogramBins + 2;

// Bins of mu: [edge, next edge), the last one without an upper end.
constexpr int kProbabilityBins = 5;
struct ProbabilityBinEdges {
  double values[kProbabilityBins + 1];
};
// A function, because device code may not name an array of the host's.
DPPO_HOST_DEVICE constexpr ProbabilityBinEdges probability_bin_edges() { return {{0.0, 0.01, 0.1, 0.5, 0.9, 1.0}}; }

// The bin of a probability; -1 for NaN.
DPPO_HOST_DEVICE int probability_bin(float mu) {
  constexpr ProbabilityBinEdges edges = probability_bin_edges();
  int bin = -1;
  DPPO_UNROLL
  for (int i = 0; i < kProbabilityBins; ++i) bin += mu >= static_cast<float>(edges.values[i]);
  return bin;
}

}  // namespace megatron_dppo
