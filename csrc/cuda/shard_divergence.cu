// D(mu || pi) over the whole vocabulary: both policies' rows are read once, side by side.
//
// A block takes a segment of a row. Of the few columns whose rollout probability is known from elsewhere, each thread
// keeps only where its next one lies: one comparison for every 16 bytes finds them, and a replaced term is never in the
// sum (taking it out afterwards would leave its rounding).

#include <algorithm>
#include <climits>

#include "../core/row_divergence.h"
#include "../core/split.h"
#include "launch.h"
#include "vector_access.cuh"

namespace megatron_dppo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBytes = 32;  // per thread, step and policy
constexpr int64_t kMinSegmentColumns = 4096;
constexpr int kBlocksPerMultiprocessor = 4;

// A row and what is the same for all of its columns.
struct Row {
  LogProbRow pi, mu;
  float exp2_scale;
  int64_t first_slot, last_slot;  // of the known ids
};

// The first known column's vector at or after this thread's vector v, of vectors of kSize columns from column `base` on
// that the threads take in turn.
template <int kSize>
__device__ __forceinline__ int next_known(const DivergenceArguments& args, const Row& row, int base, int v) {
  int next = INT_MAX;
#pragma unroll 1
  for (int64_t slot = row.first_slot; slot < row.last_slot; ++slot) {
    const int64_t offset = known_column(args, slot) - base;
    if (offset < 0 || offset >= INT_MAX) continue;
    const int at = static_cast<int>(offset) / kSize;
    if (at >= v && (at - v) % kThreads == 0) next = min(next, at);
  }
  return next;
}

template <bool kKl, int kSize>
__device__ __forceinline__ float terms(const DivergenceArguments& args, const Row& row, const float* pi,
                                       const float* mu, bool holds_known, int column) {
  float y_mu[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) y_mu[i] = nan_max((mu[i] - row.mu.max) * row.exp2_scale - row.mu.offset, kLog2Zero);
  if (holds_known) {
#pragma unroll 1
    for (int64_t slot = row.first_slot; slot < row.last_slot; ++slot) {
      const int64_t at = known_column(args, slot) - column;
      const float known = nan_max(args.known_log_prob[slot] * kLog2E, kLog2Zero);
#pragma unroll
      for (int i = 0; i < kSize; ++i) y_mu[i] = at == i ? known : y_mu[i];
    }
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float y_pi = nan_max((pi[i] - row.pi.max) * row.exp2_scale - row.pi.offset, kLog2Zero);
    if (kKl)
      sum += exp2f(y_mu[i]) * (y_mu[i] - y_pi);
    else
      sum += fabsf(exp2f(y_mu[i]) - exp2f(y_pi));
  }
  return sum;
}

// n columns from `column` on, one at a time.
template <bool kKl, typename T>
__device__ __forceinline__ float sum_elements(const DivergenceArguments& args, const Row& row, const T* pi, const T* mu,
                                              int column, int n) {
  float sum = 0.f;
  int known = next_known<1>(args, row, column, threadIdx.x);
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float x_pi = to_float(pi[i]), x_mu = to_float(mu[i]);
    sum += terms<kKl, 1>(args, row, &x_pi, &x_mu, i == known, column + i);
    if (i == known) known = next_known<1>(args, row, column, i + kThreads);
  }
  return sum;
}

template <bool kKl, typename T>
__device__ __forceinline__ float sum_segment(const DivergenceArguments& args, const Row& row, const T* pi, const T* mu,
                                             int column, int n) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kVectors = kBytes / 16;
  using Packed = typename Vector<T>::Packed;
  const bool vectorise = (reinterpret_cast<uintptr_t>(pi) - reinterpret_cast<uintptr_t>(mu)) % 16 == 0;
  const int head = vectorise ? elements_to_boundary(pi, n) : n;
  const int num_vectors = (n - head) / kSize, tail = head + num_vectors * kSize;
  const Packed* pi_vectors = reinterpret_cast<const Packed*>(pi + head);
  const Packed* mu_vectors = reinterpret_cast<const Packed*>(mu + head);

  float sum = sum_elements<kKl>(args, row, pi, mu, column, head) +
              sum_elements<kKl>(args, row, pi + tail, mu + tail, column + tail, n - tail);
  int known = next_known<kSize>(args, row, column + head, threadIdx.x);
  const auto add = [&](const Packed& packed_pi, const Packed& packed_mu, int v) {
    float x_pi[kSize], x_mu[kSize];
    Vector<T>::unpack(packed_pi, x_pi);
    Vector<T>::unpack(packed_mu, x_mu);
    sum += terms<kKl, kSize>(args, row, x_pi, x_mu, v == known, column + head + v * kSize);
    if (v == known) known = next_known<kSize>(args, row, column + head, v + kThreads);
  };
  int v = threadIdx.x;
  for (; v + (kVectors - 1) * kThreads < num_vectors; v += kVectors * kThreads) {
    Packed packed_pi[kVectors], packed_mu[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      packed_pi[j] = __ldg(pi_vectors + v + j * kThreads);
      packed_mu[j] = __ldg(mu_vectors + v + j * kThreads);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) add(packed_pi[j], packed_mu[j], v + j * kThreads);
  }
#pragma unroll 1
  for (; v < num_vectors; v += kThreads) add(__ldg(pi_vectors + v), __ldg(mu_vectors + v), v);
  return sum;
}

// The whole block's sum, in its first thread.
__device__ __forceinline__ float block_sum(float sum) {
  DPPO_SHARED(float, warp_sums, kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return 0.f;
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += warp_sums[w];
  return sum;
}

template <typename T, bool kKl>
__global__ void __launch_bounds__(kThreads)
    shard_divergence_kernel(DivergenceArguments args, int segments, int segment_columns) {
  const int64_t i = blockIdx.x / segments;
  const int num_columns = static_cast<int>(args.policy.num_columns);
  const int begin = min(static_cast<int>(blockIdx.x % segments) * segment_columns, num_columns);
  const int n = min(segment_columns, num_columns - begin);
  if (args.selection.skips(i)) {
    if (threadIdx.x == 0) args.sums[blockIdx.x] = 0.f;
    return;
  }
  const int64_t r = args.selection.row(i);
  const T* pi = static_cast<const T*>(args.policy.data) + r * args.policy.row_stride + begin;
  const T* mu = static_cast<const T*>(args.rollout.data) + r * args.rollout.row_stride + begin;
  const Row row{policy_row(args, i), rollout_row(args, i), kLog2E / args.temperature, i * args.known,
                (i + 1) * args.known};
  const float sum = block_sum(sum_segment<kKl>(args, row, pi, mu, begin, n));
  if (threadIdx.x == 0) args.sums[blockIdx.x] = sum * (kKl ? kLn2 : 0.5f);
}

template <typename T>
void launch(const DivergenceArguments& args, int64_t segments, dim3 grid, cudaStream_t stream) {
  const int64_t columns = ((args.policy.num_columns + segments - 1) / segments + 63) / 64 * 64;
  const int cut = static_cast<int>(segments), width = static_cast<int>(columns);
  const dim3 block(kThreads);
  if (args.distance == Distance::kTv)
    DPPO_LAUNCH((shard_divergence_kernel<T, false>), grid, block, stream, args, cut, width);
  else
    DPPO_LAUNCH((shard_divergence_kernel<T, true>), grid, block, stream, args, cut, width);
}

}  // namespace

int64_t divergence_segments(const DivergenceArguments& args, int multiprocessors) {
  return segments_per_row(args.selection.n, args.policy.num_columns,
                          static_cast<int64_t>(kBlocksPerMultiprocessor) * multiprocessors, kMinSegmentColumns);
}

cudaError_t launch_shard_divergence(const DivergenceArguments& args, int64_t segments, cudaStream_t stream) {
  const int64_t blocks = args.selection.n * segments;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || args.policy.num_columns > INT32_MAX / 2) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  switch_dtype(args.policy.dtype, CudaElements(),
               [&](auto tag) { launch<typename decltype(tag)::Type>(args, segments, grid, stream); });
  return DPPO_LAUNCH_STATUS();
}

}  // namespace megatron_dppo::cuda
