// Every token's share of the objective, and the sums and extrema of all tokens' metrics, in one launch.
//
// A thread takes a token at a time and keeps its totals in its own row of shared memory. The block adds the rows up,
// leaves the sums in global memory, and the block that comes last adds those, always in the blocks' order:
// floating-point atomics would give other bits on every run. The histogram counts integers, which atomics add up
// exactly.

#include <algorithm>

#include "../core/token_objective.h"
#include "last_block.cuh"
#include "launch.h"
#include "toolchain.cuh"

namespace megatron_dppo::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kSlices = kThreads / kNumTotals;
constexpr int kBlocksPerMultiprocessor = 2;
static_assert(kSlices > 0, "a thread for every total");
constexpr int kRowSize = kNumTotals | 1;  // rows of an odd number of doubles do not share their banks

// Scratch memory: every block's totals, then a counter of finished blocks.
struct Workspace {
  double* totals;
  unsigned* finished;
};

// Combines `rows` rows of totals: each slice of the block takes every kSlices-th row, then one slice combines theirs.
// The result of total `threadIdx.x` is in that thread.
template <typename Row>
__device__ __forceinline__ double combine_rows(int rows, const Row& row) {
  DPPO_SHARED(double, slices, kSlices* kNumTotals);
  const int which = threadIdx.x % kNumTotals, slice = threadIdx.x / kNumTotals;
  double total = empty_total(which);
  if (slice < kSlices) {
#pragma unroll 4
    for (int r = slice; r < rows; r += kSlices) total = combine_totals(which, total, row(r, which));
    slices[slice * kNumTotals + which] = total;
  }
  __syncthreads();
  if (threadIdx.x >= kNumTotals) return 0.0;
  total = slices[which];
#pragma unroll
  for (int s = 1; s < kSlices; ++s) total = combine_totals(which, total, slices[s * kNumTotals + which]);
  return total;
}

__global__ void __launch_bounds__(kThreads) token_objective_kernel(TokenObjectiveArguments args, Workspace workspace) {
  DPPO_SHARED(double, rows, kThreads* kRowSize);
  DPPO_SHARED(unsigned, counts, kHistogramSize);
  for (int bin = threadIdx.x; bin < kHistogramSize; bin += kThreads) counts[bin] = 0;
  double* const own = rows + threadIdx.x * kRowSize;
#pragma unroll 1
  for (int which = 0; which < kNumTotals; ++which) own[which] = empty_total(which);
  __syncthreads();

  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < args.n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int bin = add_token(args, i, own);
    if (bin >= 0) atomicAdd(counts + bin, 1u);
  }
  __syncthreads();

  for (int bin = threadIdx.x; bin < kHistogramSize; bin += kThreads)
    if (counts[bin] != 0) atomicAdd(reinterpret_cast<unsigned long long*>(args.histogram) + bin, 1ull * counts[bin]);
  double total = combine_rows(kThreads, [&](int row, int which) { return rows[row * kRowSize + which]; });
  if (threadIdx.x < kNumTotals) workspace.totals[int64_t{blockIdx.x} * kNumTotals + threadIdx.x] = total;
  if (!is_last_block(workspace.finished, gridDim.x)) return;
  total = combine_rows(static_cast<int>(gridDim.x), [&](int block, int which) {
    return __ldcg(workspace.totals + int64_t{block} * kNumTotals + which);
  });
  if (threadIdx.x < kNumTotals) report_total(args, threadIdx.x, total);
}

unsigned number_of_blocks(int64_t n, int multiprocessors) {
  const int64_t wanted = (n + kThreads - 1) / kThreads;
  return static_cast<unsigned>(
      std::max<int64_t>(1, std::min<int64_t>(wanted, int64_t{kBlocksPerMultiprocessor} * multiprocessors)));
}

}  // namespace

int64_t token_objective_workspace_bytes(int64_t n, int multiprocessors) {
  return number_of_blocks(n, multiprocessors) * int64_t{kNumTotals} * sizeof(double) + sizeof(unsigned);
}

cudaError_t launch_token_objective(const TokenObjectiveArguments& args, int multiprocessors, void* workspace,
                                   cudaStream_t stream) {
  const unsigned blocks = number_of_blocks(args.n, multiprocessors);
  Workspace shared{static_cast<double*>(workspace), nullptr};
  shared.finished = reinterpret_cast<unsigned*>(shared.totals + int64_t{blocks} * kNumTotals);
  cudaError_t error = cudaMemsetAsync(shared.finished, 0, sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(args.histogram, 0, kHistogramSize * sizeof(int64_t), stream);
  if (error != cudaSuccess) return error;
  DPPO_LAUNCH(token_objective_kernel, dim3(blocks), dim3(kThreads), stream, args, shared);
  return DPPO_LAUNCH_STATUS();
}

}  // namespace megatron_dppo::cuda
