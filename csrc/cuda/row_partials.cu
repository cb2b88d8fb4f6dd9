// Forward, step 1: one read of each selected row of a shard gives its reduction and the gathered logits.
//
// A block takes a segment of a row; with enough rows that is all of it. Each thread keeps its own reduction, fed 16
// values at a time from independent 16-byte loads; shuffles merge a warp, shared memory the warps. If a row has several
// segments, the block that comes last merges what the others left in global memory.

#include "../core/row_outputs.h"
#include "../core/split.h"
#include "last_block.cuh"
#include "launch.h"
#include "row_reduction.cuh"

namespace megatron_dppo::cuda {
namespace {

constexpr int64_t kMinSegmentColumns = 4 * kThreads * kValues;
constexpr int kBlocksPerMultiprocessor = 4;

// Scratch memory of rows in several segments: a state for every block, then a counter of finished blocks for every row.
struct Workspace {
  float4* states;
  unsigned* finished;
};

struct Cut {
  int segments;
  int segment_columns;
};

// Leaves this segment's state for the row's last block. True in every thread of that block, with the row's state in its
// first warp.
__device__ __forceinline__ bool merge_segments(RowReduction& state, const Workspace& workspace, int64_t row,
                                               int segments, float exp2_scale) {
  float4* const row_states = workspace.states + row * segments;
  if (threadIdx.x == 0)
    row_states[blockIdx.x % segments] = make_float4(state.max, state.rest, state.shifted, state.squares);
  if (!is_last_block(workspace.finished + row, static_cast<unsigned>(segments))) return false;
  if (threadIdx.x < 32) {
    state = RowReduction();
#pragma unroll 1
    for (int i = threadIdx.x; i < segments; i += 32) {
      const float4 part = __ldcg(row_states + i);
      state = merge(state, RowReduction{part.x, part.y, part.z, part.w}, exp2_scale);
    }
    state = warp_merge(state, exp2_scale);
  }
  return true;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) row_partials_kernel(PartialsArguments args, Workspace workspace, Cut cut) {
  const int64_t i = blockIdx.x / cut.segments;
  const int begin =
      min(static_cast<int>(blockIdx.x % cut.segments) * cut.segment_columns, static_cast<int>(args.logits.num_columns));
  const int end = min(begin + cut.segment_columns, static_cast<int>(args.logits.num_columns));
  if (args.selection.skips(i)) {  // all of the row's blocks, before any counts itself as finished
    if (blockIdx.x % cut.segments == 0 && threadIdx.x == 0) write_no_partials(args, i);
    return;
  }
  const T* x = static_cast<const T*>(args.logits.data) + args.selection.row(i) * args.logits.row_stride;
  const float exp2_scale = kLog2E / args.temperature;

  RowReduction state = block_merge(reduce_segment(x + begin, end - begin, exp2_scale), exp2_scale);
  if (cut.segments > 1 && !merge_segments(state, workspace, i, cut.segments, exp2_scale)) return;

  write_partials(args, i, x, state);
}

Cut cut_rows(const PartialsArguments& args, const PartialsPlan& plan) {
  const int64_t columns = (args.logits.num_columns + plan.segments - 1) / plan.segments;
  return {static_cast<int>(plan.segments), static_cast<int>((columns + 63) / 64 * 64)};
}

}  // namespace

int multiprocessor_count() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

int64_t l2_cache_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device);
  return bytes;
}

PartialsPlan plan_row_partials(const PartialsArguments& args, int multiprocessors) {
  const int64_t n = args.selection.n;
  const int64_t segments = segments_per_row(
      n, args.logits.num_columns, static_cast<int64_t>(kBlocksPerMultiprocessor) * multiprocessors, kMinSegmentColumns);
  const int64_t bytes = n * segments * sizeof(float4) + n * sizeof(unsigned);
  return {segments, segments > 1 ? bytes : 0};
}

cudaError_t launch_row_partials(const PartialsArguments& args, const PartialsPlan& plan, void* workspace,
                                cudaStream_t stream) {
  const int64_t n = args.selection.n, blocks = n * plan.segments;
  if (n == 0) return cudaSuccess;
  if (blocks > INT32_MAX || args.logits.num_columns > INT32_MAX / 2) return cudaErrorInvalidValue;
  Workspace shared{static_cast<float4*>(workspace), nullptr};
  if (plan.segments > 1) {
    shared.finished = reinterpret_cast<unsigned*>(shared.states + blocks);
    const cudaError_t error = cudaMemsetAsync(shared.finished, 0, n * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  const Cut cut = cut_rows(args, plan);
  switch_dtype(args.logits.dtype, CudaElements(), [&](auto tag) {
    DPPO_LAUNCH(row_partials_kernel<typename decltype(tag)::Type>, grid, block, stream, args, shared, cut);
  });
  return DPPO_LAUNCH_STATUS();
}

}  // namespace megatron_dppo::cuda
