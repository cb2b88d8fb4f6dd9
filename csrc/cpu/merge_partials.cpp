// Forward, step 2: the shards' partials, gathered from every rank, become the outputs.

#include <ATen/Parallel.h>

#include "kernels.h"

#include "../core/row_outputs.h"

namespace megatron_dppo::cpu {

void merge_partials(const MergeArguments& args) {
  at::parallel_for(0, args.n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) finish_row(args, row);
  });
}

}  // namespace megatron_dppo::cpu
