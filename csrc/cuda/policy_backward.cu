// Backward: one read and one write of each row that something flows back through, one write of the others.
//
// The gradient may overwrite the logits: every element is written by the thread that read it, and the target's own
// column, which needs another formula, is rewritten from saved statistics and not from the logits.

#include <algorithm>

#include "../core/row_outputs.h"
#include "../core/split.h"
#include "launch.h"
#include "row_gradient.cuh"

namespace megatron_dppo::cuda {
namespace {

constexpr int64_t kMinSegmentColumns = 4096;
constexpr int64_t kMaxSegmentColumns = 16384;
constexpr int kBlocksPerMultiprocessor = 8;

struct Cut {
  int segments;
  int segment_columns;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) policy_backward_kernel(BackwardArguments args, Cut cut) {
  const int64_t i = blockIdx.x / cut.segments;
  const int columns = static_cast<int>(args.logits.columns);
  const int begin = min(static_cast<int>(blockIdx.x % cut.segments) * cut.segment_columns, columns);
  const int end = min(begin + cut.segment_columns, columns);
  const T* x = static_cast<const T*>(args.logits.data) + i * args.logits.row_stride;
  T* out = static_cast<T*>(args.grad_logits) + i * args.grad_row_stride;
  const float exp2_scale = kLog2E / args.temperature;

  const RowGradient g = row_gradient(args, i);
  const int valid_end = g.is_zero ? begin : max(begin, min(end, static_cast<int>(args.logits.num_columns)));
  transform<false>(x + begin, out + begin, valid_end - begin,
                   [&](float value) { return gradient(value, g, exp2_scale); });
  fill_zero(out + valid_end, end - valid_end);
  if (g.is_zero || g.target_column < begin || g.target_column >= valid_end) return;
  __syncthreads();  // whoever wrote the target's column has done so
  if (threadIdx.x == 0) out[g.target_column] = from_float<T>(g.at_target);
}

Cut cut_rows(const BackwardArguments& args, int multiprocessors) {
  const int64_t columns = args.logits.columns;
  const int64_t wanted = static_cast<int64_t>(kBlocksPerMultiprocessor) * multiprocessors;
  const int64_t segments = std::max(segments_per_row(args.n, columns, wanted, kMinSegmentColumns),
                                    (columns + kMaxSegmentColumns - 1) / kMaxSegmentColumns);
  const int64_t segment_columns = ((columns + segments - 1) / segments + 63) / 64 * 64;
  return {static_cast<int>(segments), static_cast<int>(segment_columns)};
}

}  // namespace

cudaError_t launch_policy_backward(const BackwardArguments& args, int multiprocessors, cudaStream_t stream) {
  if (args.n == 0 || args.logits.columns == 0) return cudaSuccess;
  const Cut cut = cut_rows(args, multiprocessors);
  const int64_t blocks = args.n * cut.segments;
  if (blocks > INT32_MAX || args.logits.columns > INT32_MAX / 2) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  switch_dtype(args.logits.dtype, CudaElements(), [&](auto tag) {
    DPPO_LAUNCH(policy_backward_kernel<typename decltype(tag)::Type>, grid, block, stream, args, cut);
  });
  return DPPO_LAUNCH_STATUS();
}

}  // namespace megatron_dppo::cuda
