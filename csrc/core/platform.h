// What the host and the device compilers call differently, and nothing else.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DPPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DPPO_HOST_DEVICE inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__)
#define DPPO_UNROLL _Pragma("unroll")
#else
#define DPPO_UNROLL
#endif

namespace megatron_dppo {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLowestFloat = -3.402823466e38f;

// Maximum and minimum that are NaN when either argument is: fmaxf would drop a NaN logit and return a plausible number.
DPPO_HOST_DEVICE float nan_max(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));  // one instruction, from sm_80 on
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

DPPO_HOST_DEVICE float nan_min(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a < b || a != a ? a : b;
#endif
}

}  // namespace megatron_dppo
