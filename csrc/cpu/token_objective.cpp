// Every token's share of the objective. Totals are summed over chunks of tokens whose size does not depend on the
// number of threads, then in the chunks' order: the same batch gives the same bits.

#include "../core/token_objective.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "kernels.h"

namespace megatron_dppo::cpu {
namespace {

constexpr int64_t kChunk = 512;

using Totals = std::array<double, kNumTotals>;

Totals empty_totals() {
  Totals totals;
  for (int which = 0; which < kNumTotals; ++which) totals[which] = empty_total(which);
  return totals;
}

}  // namespace

void token_objective(const TokenObjectiveArguments& args) {
  std::fill_n(args.histogram, kHistogramSize, 0);
  std::vector<Totals> chunks((args.n + kChunk - 1) / kChunk, empty_totals());
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kChunk; i < std::min(end * kChunk, args.n); ++i) {
      const int bin = add_token(args, i, chunks[i / kChunk].data());
      if (bin >= 0) std::atomic_ref<int64_t>(args.histogram[bin]).fetch_add(1, std::memory_order_relaxed);
    }
  });
  Totals totals = empty_totals();
  for (const Totals& chunk : chunks)
    for (int which = 0; which < kNumTotals; ++which) totals[which] = combine_totals(which, totals[which], chunk[which]);
  for (int which = 0; which < kNumTotals; ++which) report_total(args, which, totals[which]);
}

}  // namespace megatron_dppo::cpu
