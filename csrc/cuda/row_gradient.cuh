// How a block writes the gradient of a row, or of a segment of one.
#pragma once

#include "../core/row_outputs.h"
#include "row_threads.cuh"
#include "vector_access.cuh"

namespace megatron_dppo::cuda {

constexpr int kBytes = 32;  // per thread and step

template <bool Streams, typename Packed>
__device__ __forceinline__ void store(Packed* p, const Packed& value) {
  if constexpr (Streams)
    __stcs(p, value);
  else
    *p = value;
}

__device__ __forceinline__ float gradient(float x, const RowGradient& row, float exp2_scale) {
  // The floor keeps slope * y finite where the probability is 0, and is far below the last non-zero power.
  const float y = nan_max((x - row.max) * exp2_scale - row.log2_sum, -1000.f);
  return exp2f(y) * (row.constant + row.slope * y);
}

// Writes f(x[i]) to out[i] for i in [0, n): 16 bytes at a time if x and out are equally far from a 16-byte boundary.
// Streams: what is written is not read again, so it is to be the first to leave the L2 cache.
template <bool Streams, typename T, typename Function>
__device__ __forceinline__ void transform(const T* x, T* out, int n, const Function& f) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kVectors = kBytes / 16;
  using Packed = typename Vector<T>::Packed;
  const int tid = threadIdx.x;
  const bool vectorise = (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const int head = vectorise ? elements_to_boundary(out, n) : n;
  const int num_vectors = (n - head) / kSize;
  const Packed* from = reinterpret_cast<const Packed*>(x + head);
  Packed* to = reinterpret_cast<Packed*>(out + head);

  int v = tid;
  for (; v + (kVectors - 1) * kThreads < num_vectors; v += kVectors * kThreads) {
    Packed packed[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) packed[j] = from[v + j * kThreads];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      float values[kSize];
      Vector<T>::unpack(packed[j], values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = f(values[i]);
      store<Streams>(to + v + j * kThreads, Vector<T>::pack(values));
    }
  }
#pragma unroll 1
  for (; v < num_vectors; v += kThreads) {
    float values[kSize];
    Vector<T>::unpack(from[v], values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = f(values[i]);
    store<Streams>(to + v, Vector<T>::pack(values));
  }
#pragma unroll 1
  for (int i = tid; i < head; i += kThreads) out[i] = from_float<T>(f(to_float(x[i])));
#pragma unroll 1
  for (int i = head + num_vectors * kSize + tid; i < n; i += kThreads) out[i] = from_float<T>(f(to_float(x[i])));
}

template <typename T>
__device__ __forceinline__ void fill_zero(T* out, int n) {
  constexpr int kSize = Vector<T>::kSize;
  const int head = elements_to_boundary(out, n);
  const int num_vectors = (n - head) / kSize;
  uint4* to = reinterpret_cast<uint4*>(out + head);
  for (int v = threadIdx.x; v < num_vectors; v += kThreads) to[v] = make_uint4(0, 0, 0, 0);
  const int tail = n - head - num_vectors * kSize;
  const int i = threadIdx.x;
  if (i < head + tail) out[i < head ? i : n - tail + (i - head)] = from_float<T>(0.f);
}

}  // namespace megatron_dppo::cuda
