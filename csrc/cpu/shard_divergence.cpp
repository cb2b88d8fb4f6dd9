// D(mu || pi) over the whole vocabulary: both policies' rows are read once, side by side, a chunk at a time.

#include <vector>

#include "kernels.h"
#include "lane_sums.h"
#include "row_tasks.h"
#include "vector_math.h"

#include "../core/row_divergence.h"

namespace megatron_dppo::cpu {
namespace {

constexpr int64_t kChunk = 1024;

// log2 p of n logits, no less than log2 of what stands for 0.
template <typename T>
DPPO_INLINE void log2_probabilities(const T* x, int64_t n, const LogProbRow& row, float exp2_scale, float* y) {
  const float max = row.max, offset = row.offset;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float value = (to_float(x[i]) - max) * exp2_scale - offset;
    y[i] = value < kLog2Zero ? kLog2Zero : value;
  }
}

struct TotalVariationTerm {
  const float *y_mu, *y_pi;
  DPPO_INLINE float operator()(int64_t i) const {
    const float difference = exp2_nonpositive(y_mu[i]).two_to_y - exp2_nonpositive(y_pi[i]).two_to_y;
    return difference < 0.f ? -difference : difference;
  }
};

struct KlTerm {
  const float *y_mu, *y_pi;
  DPPO_INLINE float operator()(int64_t i) const { return exp2_nonpositive(y_mu[i]).two_to_y * (y_mu[i] - y_pi[i]); }
};

// The columns [begin, end) of selected row i.
template <typename T>
DPPO_INLINE double sum_columns(const DivergenceArguments& args, int64_t i, int64_t begin, int64_t end) {
  alignas(64) float y_pi[kChunk], y_mu[kChunk];
  const int64_t r = args.selection.row(i);
  const T* pi = static_cast<const T*>(args.policy.data) + r * args.policy.row_stride;
  const T* mu = static_cast<const T*>(args.rollout.data) + r * args.rollout.row_stride;
  const LogProbRow pi_row = policy_row(args, i), mu_row = rollout_row(args, i);
  const float exp2_scale = kLog2E / args.temperature;
  double sum = 0.0;
  for (; begin < end; begin += kChunk) {
    const int64_t n = std::min(kChunk, end - begin);
    log2_probabilities(pi + begin, n, pi_row, exp2_scale, y_pi);
    log2_probabilities(mu + begin, n, mu_row, exp2_scale, y_mu);
    for (int64_t slot = i * args.known; slot < (i + 1) * args.known; ++slot) {
      const int64_t column = known_column(args, slot) - begin;
      if (column >= 0 && column < n) y_mu[column] = nan_max(args.known_log_prob[slot] * kLog2E, kLog2Zero);
    }
    sum += args.distance == Distance::kTv ? sum_terms(n, TotalVariationTerm{y_mu, y_pi})
                                          : sum_terms(n, KlTerm{y_mu, y_pi});
  }
  return (args.distance == Distance::kTv ? 0.5 : static_cast<double>(kLn2)) * sum;
}

DPPO_CPU_CLONES double sum(TypeTag<float>, const DivergenceArguments& args, int64_t i, int64_t begin, int64_t end) {
  return sum_columns<float>(args, i, begin, end);
}
DPPO_CPU_CLONES double sum(TypeTag<BFloat16>, const DivergenceArguments& args, int64_t i, int64_t begin, int64_t end) {
  return sum_columns<BFloat16>(args, i, begin, end);
}
DPPO_CPU_CLONES double sum(TypeTag<Float16>, const DivergenceArguments& args, int64_t i, int64_t begin, int64_t end) {
  return sum_columns<Float16>(args, i, begin, end);
}

}  // namespace

void shard_divergence(const DivergenceArguments& args) {
  const int64_t columns = args.policy.num_columns;
  const std::vector<int64_t> inside = rows_of_mask(args.selection.mask, args.selection.n, true);
  const int64_t n = inside.size();
  const RowCut cut(n, columns);
  std::vector<double> parts(n * cut.segments);
  switch_dtype(args.policy.dtype, CpuElements(), [&](auto tag) {
    for_each_segment(n, columns, cut, [&](int64_t k, int64_t segment, int64_t begin, int64_t end) {
      parts[k * cut.segments + segment] = sum(tag, args, inside[k], begin, end);
    });
  });
  std::fill_n(args.sums, args.selection.n, 0.f);
  for (int64_t k = 0; k < n; ++k) {
    double total = 0.0;
    for (int64_t segment = 0; segment < cut.segments; ++segment) total += parts[k * cut.segments + segment];
    args.sums[inside[k]] = static_cast<float>(total);
  }
}

}  // namespace megatron_dppo::cpu
