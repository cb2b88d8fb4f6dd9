// How a block reduces a row, or a segment of one, and writes its partials.
#pragma once

#include "../core/row_outputs.h"
#include "row_threads.cuh"
#include "vector_access.cuh"

namespace megatron_dppo::cuda {

constexpr int kValues = 16;  // per thread and step

template <bool ReadOnly, typename Packed>
__device__ __forceinline__ Packed load(const Packed* p) {
  return ReadOnly ? __ldg(p) : *p;
}

// Inserts what a thread has in steps of kValues, kStepsAhead of them at a time, and moves v behind them.
template <typename T, int kStepsAhead, bool ReadOnly>
__device__ __forceinline__ void reduce_steps(RowReduction& state, int& v, const typename Vector<T>::Packed* vectors,
                                             int num_vectors, float exp2_scale) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kLoads = kValues / kSize;
  for (; v + (kStepsAhead * kLoads - 1) * kThreads < num_vectors; v += kStepsAhead * kLoads * kThreads) {
    typename Vector<T>::Packed packed[kStepsAhead][kLoads];
#pragma unroll
    for (int i = 0; i < kStepsAhead * kLoads; ++i)
      packed[i / kLoads][i % kLoads] = load<ReadOnly>(vectors + v + i * kThreads);
#pragma unroll
    for (int step = 0; step < kStepsAhead; ++step) {
      float values[kValues];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) Vector<T>::unpack(packed[step][i], values + i * kSize);
      insert(state, values, exp2_scale);
    }
  }
}

// The reduction of this thread's share of n values. A thread issues the loads of kStepsAhead steps before it computes
// the first: where few threads are on a multiprocessor, that many have to be under way to use the memory. ReadOnly:
// nothing writes to the values while the kernel runs. Neither changes a bit.
template <typename T, int kStepsAhead = 1, bool ReadOnly = true>
__device__ __forceinline__ RowReduction reduce_segment(const T* x, int n, float exp2_scale) {
  constexpr int kSize = Vector<T>::kSize;
  using Packed = typename Vector<T>::Packed;
  const int tid = threadIdx.x;
  const int head = elements_to_boundary(x, n);
  const Packed* vectors = reinterpret_cast<const Packed*>(x + head);
  const int num_vectors = (n - head) / kSize;

  RowReduction state;
  int v = tid;
  reduce_steps<T, kStepsAhead, ReadOnly>(state, v, vectors, num_vectors, exp2_scale);
  if constexpr (kStepsAhead > 1) reduce_steps<T, 1, ReadOnly>(state, v, vectors, num_vectors, exp2_scale);
#pragma unroll 1
  for (; v < num_vectors; v += kThreads) {
    float values[kSize];
    Vector<T>::unpack(load<ReadOnly>(vectors + v), values);
    insert(state, values, exp2_scale);
  }
  // What the vectors left out at both ends, fewer elements than threads.
  const int tail = n - head - num_vectors * kSize;
  if (tid < head + tail) {
    float value[1] = {to_float(x[tid < head ? tid : n - tail + (tid - head)])};
    insert(state, value, exp2_scale);
  }
  return state;
}

__device__ __forceinline__ RowReduction warp_merge(RowReduction state, float exp2_scale) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    RowReduction other;
    other.max = __shfl_xor_sync(0xffffffffu, state.max, distance);
    other.rest = __shfl_xor_sync(0xffffffffu, state.rest, distance);
    other.shifted = __shfl_xor_sync(0xffffffffu, state.shifted, distance);
    other.squares = __shfl_xor_sync(0xffffffffu, state.squares, distance);
    state = merge(state, other, exp2_scale);
  }
  return state;
}

// The whole block's state, in all threads of its first warp.
__device__ __forceinline__ RowReduction block_merge(RowReduction state, float exp2_scale) {
  DPPO_SHARED(RowReduction, warp_states, kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  state = warp_merge(state, exp2_scale);
  if (lane == 0) warp_states[warp] = state;
  __syncthreads();
  if (warp != 0) return state;
  return warp_merge(lane < kWarps ? warp_states[lane] : RowReduction(), exp2_scale);
}

// Writes row i's partials: `state` of it is in the first thread, x are its columns.
template <typename T>
__device__ __forceinline__ void write_partials(const PartialsArguments& args, int64_t i, const T* x,
                                               const RowReduction& state) {
  float* out = args.partials + i * (kTopk + args.topk);
  if (threadIdx.x == 0) write_state(state, args.temperature, out);
  for (int64_t k = threadIdx.x; k <= args.topk; k += kThreads) {
    const int64_t id = k == 0 ? args.target[i] : args.topk_ids[i * args.topk + k - 1];
    const int64_t column = id - args.logits.first_column;
    const bool here = column >= 0 && column < args.logits.num_columns;
    out[kTarget + k] = here ? to_float(x[column]) / args.temperature : 0.f;
  }
}

}  // namespace megatron_dppo::cuda
