// Element types and the exponential in a form that gcc and clang vectorise: no branches, no calls, 32-bit lanes only.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/dtype_switch.h"
#include "../core/platform.h"

// One clone of a function per x86-64 level (AVX-512, AVX2 + FMA, baseline), chosen when the library is loaded (gcc from
// 12 on). A build for one level has that one (MEGATRON_DPPO_CPU_LEVEL, csrc/build_extension.py). Elsewhere the
// compiler's own target decides; on aarch64 the baseline already has 128-bit vectors and FMA.
#if defined(DPPO_CPU_LEVEL)
#define DPPO_CPU_CLONES __attribute__((target("arch=" DPPO_CPU_LEVEL)))
#elif defined(DPPO_NO_CPU_CLONES)  // the tests', to compile as other processors do
#define DPPO_CPU_CLONES
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DPPO_HAS_CPU_CLONES
#define DPPO_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DPPO_CPU_CLONES
#endif
#define DPPO_INLINE inline __attribute__((always_inline))

namespace megatron_dppo::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
using CpuElements = ElementTypes<float, BFloat16, Float16>;

template <typename To, typename From>
DPPO_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

DPPO_INLINE float to_float(float x) { return x; }
DPPO_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
DPPO_INLINE float to_float(Float16 x) {
  // The exponent field moves into place and is rebiased by an exact multiplication, which also normalises subnormals.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>((magnitude >= 0x7c00u << 13 ? finite | 0x7f800000u : finite) | sign);
}

// Rounding to nearest, ties to even; NaN stays NaN, what overflows becomes infinity.
template <typename T>
T from_float(float x);
template <>
DPPO_INLINE float from_float<float>(float x) {
  return x;
}
template <>
DPPO_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}
template <>
DPPO_INLINE Float16 from_float<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half's 10 bits, correctly rounded by the addition, at the bottom of the sum.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | sign)};
}

// 2^y for y at most (about) 0: relative error below 2e-7, exactly 1 at 0, exactly 0 from 2^-126 down, NaN where y is
// NaN.
struct Exponent {
  float y;  // -126 where the argument was less, so that y * two_to_y is 0 and not NaN
  float two_to_y;
};
DPPO_INLINE Exponent exp2_nonpositive(float argument) {
  // In this order x86's maximum returns its second operand if one is NaN.
  const float y = -126.f > argument ? -126.f : argument;
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  const float rounded = y + magic;
  const float f = y - (rounded - magic);
  float p = 0x1.5bba12p-10f;  // minimax for (2^f - 1) / f on [-1/2, 1/2]
  p = p * f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  p = p * f + 1.f;
  const float power = bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(rounded) << 23));
  return {y, power - 0x1p-126f};  // changes nothing above 2^-102, and makes the clamped argument's power 0
}

}  // namespace megatron_dppo::cpu
