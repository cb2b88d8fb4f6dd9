// Forward, step 2: the shards' partials, gathered from every rank, become the outputs. One thread a row: there are only
// 5 + K numbers per row and shard.

#include "../core/row_outputs.h"
#include "launch.h"
#include "toolchain.cuh"

namespace megatron_dppo::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) merge_partials_kernel(MergeArguments args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < args.n) finish_row(args, row);
}

}  // namespace

cudaError_t launch_merge_partials(const MergeArguments& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  const int64_t blocks = (args.n + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  DPPO_LAUNCH(merge_partials_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, args);
  return DPPO_LAUNCH_STATUS();
}

}  // namespace megatron_dppo::cuda
