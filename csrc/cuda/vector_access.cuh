// 16 bytes of logits at a time, as floats.
#pragma once

#include <cstdint>

#include "../core/dtype_switch.h"
#include "toolchain.cuh"

namespace megatron_dppo::cuda {

using CudaElements = ElementTypes<float, __nv_bfloat16, __half>;

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// A 16-byte vector of T. `Packed` is what a load or store moves; unpack and pack convert, rounding to nearest even.
template <typename T>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  using Packed = float4;
  static __device__ __forceinline__ void unpack(const Packed& v, float* x) {
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
  static __device__ __forceinline__ Packed pack(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }
};

template <>
struct Vector<__nv_bfloat16> {
  static constexpr int kSize = 8;
  using Packed = uint4;
  static __device__ __forceinline__ void unpack(const Packed& v, float* x) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a bfloat16 is the upper half of a float
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ unsigned pack2(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return static_cast<unsigned>(__bfloat16_as_ushort(pair.x)) | static_cast<unsigned>(__bfloat16_as_ushort(pair.y))
                                                                     << 16;
  }
  static __device__ __forceinline__ Packed pack(const float* x) {
    return make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
  }
};

template <>
struct Vector<__half> {
  static constexpr int kSize = 8;
  using Packed = uint4;
  static __device__ __forceinline__ void unpack(const Packed& v, float* x) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
      x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
    }
  }
  static __device__ __forceinline__ unsigned pack2(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return static_cast<unsigned>(__half_as_ushort(pair.x)) | static_cast<unsigned>(__half_as_ushort(pair.y)) << 16;
  }
  static __device__ __forceinline__ Packed pack(const float* x) {
    return make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
  }
};

// How many elements precede the first 16-byte boundary at or after `p`, at most `n`.
template <typename T>
__device__ __forceinline__ int elements_to_boundary(const T* p, int n) {
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % Vector<T>::kSize);
  return min(past == 0 ? 0 : Vector<T>::kSize - past, n);
}

}  // namespace megatron_dppo::cuda
