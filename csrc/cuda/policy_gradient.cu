// Forward and backward of a policy gradient at once: one read and one write of every row, as far as the memory is
// concerned.
//
// A block takes a row at a time, all of it: reduces it, decides about its token, and writes the gradient over the
// logits. It reads the row twice, the second time out of the L2 cache: the blocks are so few that their rows fit into
// it (policy_gradient_blocks). Where that leaves one block to a multiprocessor, the first read needs more loads under
// way for each thread than elsewhere.

#include "../core/policy_gradient.h"

#include <algorithm>

#include "launch.h"
#include "row_gradient.cuh"
#include "row_reduction.cuh"

namespace megatron_dppo::cuda {
namespace {

constexpr int kStepsAhead = 4;
constexpr int kBlocksPerMultiprocessor = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    policy_gradient_kernel(PolicyGradientArguments args) {
  DPPO_SHARED(RowGradient, gradients, 1);
  const LogitsShard& logits = args.partials.logits;
  const int columns = static_cast<int>(logits.columns), num_columns = static_cast<int>(logits.num_columns);
  const float exp2_scale = kLog2E / args.partials.temperature;
#pragma unroll 1
  for (int64_t i = blockIdx.x; i < args.partials.selection.n; i += gridDim.x) {
    T* const x = static_cast<T*>(args.backward.grad_logits) + i * logits.row_stride;
    const bool is_inside = !args.partials.selection.skips(i);
    if (is_inside) {
      const RowReduction state =
          block_merge(reduce_segment<T, kStepsAhead, false>(x, num_columns, exp2_scale), exp2_scale);
      write_partials(args.partials, i, x, state);
    }
    __syncthreads();  // the partials are written
    if (threadIdx.x == 0) finish_statistics(args.merge, i);
    if (args.merge.topk > 0) {
      __syncthreads();  // the statistics are
      for (int64_t k = threadIdx.x; is_inside && k < args.merge.topk; k += kThreads)
        write_topk(args.merge, i, k, kTarget, kTopk + args.merge.topk);
      __syncthreads();  // and the top K's log-probabilities
    }
    if (threadIdx.x == 0) gradients[0] = decide_row(args, i);
    __syncthreads();

    const RowGradient g = gradients[0];
    const int valid_end = g.is_zero ? 0 : num_columns;
    transform<true>(x, x, valid_end, [&](float value) { return gradient(value, g, exp2_scale); });
    fill_zero(x + valid_end, columns - valid_end);
    __syncthreads();  // whoever wrote the target's column has done so, and all have read the gradient
    if (threadIdx.x == 0 && !g.is_zero && g.target_column >= 0) x[g.target_column] = from_float<T>(g.at_target);
  }
}

}  // namespace

int64_t policy_gradient_blocks(const PolicyGradientArguments& args, int multiprocessors, int64_t cache_bytes) {
  const LogitsShard& logits = args.partials.logits;
  const int64_t element_bytes = logits.dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t row_bytes = std::max<int64_t>(logits.num_columns * element_bytes, 1);
  const int64_t rows = static_cast<int64_t>(kCacheShare * static_cast<double>(cache_bytes)) / row_bytes;
  const int64_t per_multiprocessor = std::min<int64_t>(rows / multiprocessors, kBlocksPerMultiprocessor);
  return std::min(args.partials.selection.n, std::max<int64_t>(per_multiprocessor, 1) * multiprocessors);
}

cudaError_t launch_policy_gradient(const PolicyGradientArguments& args, int64_t blocks, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || args.partials.logits.columns > INT32_MAX / 2) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  switch_dtype(args.partials.logits.dtype, CudaElements(), [&](auto tag) {
    DPPO_LAUNCH(policy_gradient_kernel<typename decltype(tag)::Type>, grid, block, stream, args);
  });
  return DPPO_LAUNCH_STATUS();
}

}  // namespace megatron_dppo::cuda
