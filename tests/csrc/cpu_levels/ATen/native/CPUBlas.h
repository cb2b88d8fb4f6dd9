// Stands in for torch's header of this name where tests compile a CPU kernel by itself: products of blocks by
// definition, on any processor. They read what they are said to and nothing else, as a sanitizer can see.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define CPUBLAS_BRGEMM_BF16BF16F32
#define CPUBLAS_BRGEMM_F16F16F32

namespace at {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float to_float(Half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return x.bits >> 15 != 0 ? -magnitude : magnitude;
}

namespace native::cpublas {

template <typename T>
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const T* a,
            const T* b, float* c, bool) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = accumulate ? c[i * ldc + j] : 0.0f;
      for (int64_t p = 0; p < k; ++p) sum += to_float(a[i * lda + p]) * to_float(b[(p / 2 * ldb + j) * 2 + p % 2]);
      c[i * ldc + j] = sum;
    }
}

inline void brgemm_release(bool) {}

}  // namespace native::cpublas
}  // namespace at
