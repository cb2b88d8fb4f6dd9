// Runs CUDA kernels on the host, for tests only: every CUDA thread of a block is a fiber, blocks run one after another.
//
// A .cu file compiled by a C++ compiler with -x c++ -DDPPO_HOST_EMULATION includes this in place of the CUDA runtime.
// The toolkit's own headers supply the vector types and the host side of bfloat16 and half arithmetic. It finds missing
// and divergent barriers, divergent shuffles, reads of unwritten shared memory and, with sanitizers, overruns,
// misalignment and races within and between blocks. It says nothing about speed or about the device's approximate
// arithmetic.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

#undef __global__
#undef __device__
#undef __launch_bounds__
#define __global__
#define __device__
#define __launch_bounds__(...)
#define threadIdx (::megatron_dppo::emulation::context.thread)
#define blockIdx (::megatron_dppo::emulation::context.block)
#define blockDim (::megatron_dppo::emulation::context.block_dim)
#define gridDim (::megatron_dppo::emulation::context.grid_dim)
#define __syncthreads() ::megatron_dppo::emulation::sync_threads(__FILE__, __LINE__)
#define DPPO_SHARED(type, name, count) \
  type* const name =                   \
      static_cast<type*>(::megatron_dppo::emulation::shared_array(__FILE__, __LINE__, sizeof(type) * (count)))
#define DPPO_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), ::megatron_dppo::emulation::launch(#kernel, (blocks), (threads), [&] { kernel(__VA_ARGS__); }))
#define DPPO_LAUNCH_STATUS() cudaSuccess

namespace megatron_dppo::emulation {

template <typename Kernel>
void launch(const char* name, dim3 grid, dim3 block, Kernel kernel) {
  run_grid(name, grid, block, [](void* k) { (*static_cast<Kernel*>(k))(); }, &kernel);
}

}  // namespace megatron_dppo::emulation

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "a shuffle moves 4 or 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = megatron_dppo::emulation::exchange(mask, word, megatron_dppo::emulation::lane() ^ lane_mask);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
inline void __threadfence() { megatron_dppo::emulation::thread_fence(); }
template <typename T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_integral<T>::value,
                "sums of floating-point atomics depend on the schedule: no kernel uses them");
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMax(T* p, T value) {
  static_assert(std::is_integral<T>::value, "only integers have an atomic maximum");
  T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (before < value && !__atomic_compare_exchange_n(p, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
using std::max;
using std::min;
