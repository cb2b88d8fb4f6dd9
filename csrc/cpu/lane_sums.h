// How terms are added up in single precision, whatever the width of the processor's vectors: kDepth numbers in turn,
// then blocks of kDepth * kLanes, then the lanes down to 8, pairwise; beyond that in double precision. Every processor
// adds in the same order, and no term passes through many roundings. With one sum for each of a vector's lanes these
// would be hundreds, and where all terms are alike, as near certainty, their errors do not average out.
#pragma once

#include <cstdint>

#include "vector_math.h"

namespace megatron_dppo::cpu {

constexpr int kLanes = 32;
constexpr int kDepth = 8;

// Destroys the lanes.
DPPO_INLINE double sum_of(float* lanes) {
  for (int width = kLanes / 2; width >= 8; width /= 2)
#pragma omp simd
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  double sum = 0.0;
  for (int j = 0; j < 8; ++j) sum += lanes[j];
  return sum;
}

// The sum of term(0) ... term(n - 1). No term passes through more than kDepth - 1 + n / (kDepth * kLanes) + kDepth +
// log2(kLanes / 8) roundings.
template <typename Term>
DPPO_INLINE double sum_terms(int64_t n, const Term& term) {
  alignas(64) float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kDepth * kLanes <= n; i += kDepth * kLanes)
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      float sum = 0.f;
#pragma GCC unroll 8
      for (int k = 0; k < kDepth; ++k) sum += term(i + k * kLanes + j);
      lanes[j] += sum;
    }
  for (; i < n; i += kLanes) {
    const int64_t width = n - i < kLanes ? n - i : kLanes;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) lanes[j] += term(i + j);
  }
  return sum_of(lanes);
}

}  // namespace megatron_dppo::cpu
