// A product of small 16-bit matrices that is summed in fp32, in this processor's instructions for it: torch's brgemm,
// which is oneDNN's. It is there from AVX512-BF16 (bfloat16) and AVX512-FP16 or AMX-FP16 (float16) on.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstdint>
#include <exception>

#include "../core/arguments.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace megatron_dppo::cpu {

// c [m, n] (+)= a [m, k] @ b. k is even, b is [k / 2, ldb, 2]: two values of a column are next to each other.
inline void block_product([[maybe_unused]] Dtype dtype, [[maybe_unused]] int64_t m, [[maybe_unused]] int64_t n,
                          [[maybe_unused]] int64_t k, [[maybe_unused]] const uint16_t* a, [[maybe_unused]] int64_t lda,
                          [[maybe_unused]] const uint16_t* b, [[maybe_unused]] int64_t ldb, [[maybe_unused]] float* c,
                          [[maybe_unused]] int64_t ldc, [[maybe_unused]] bool accumulate) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  if (dtype == Dtype::kBFloat16)
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, reinterpret_cast<const at::BFloat16*>(a),
                                reinterpret_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
#endif
#if defined(CPUBLAS_BRGEMM_F16F16F32)
  if (dtype == Dtype::kFloat16)
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, reinterpret_cast<const at::Half*>(a),
                                reinterpret_cast<const at::Half*>(b), c, /*is_vnni=*/true);
#endif
}

// To be called by a thread after its last product: it may hold the matrix unit.
inline void end_block_products() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm_release(/*is_vnni=*/true);
#endif
}

// Whether the processor has instructions for such products. Where it has not, oneDNN may still have a way, but a slow
// one.
inline bool processor_multiplies([[maybe_unused]] Dtype dtype) {
#if defined(__x86_64__) && defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPUBLAS_BRGEMM_F16F16F32)
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_supports("avx512f") || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  const bool avx512_fp16 = (edx >> 23 & 1) != 0;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0) return false;
  const bool avx512_bf16 = (eax >> 5 & 1) != 0, amx_fp16 = (eax >> 21 & 1) != 0;
  return dtype == Dtype::kBFloat16 ? avx512_bf16 : avx512_fp16 || amx_fp16;
#else
  return false;
#endif
}

// Tried out: oneDNN may have been told to leave instructions alone, or be left out of torch.
inline bool has_block_product(Dtype dtype) {
  if (!processor_multiplies(dtype)) return false;
  const uint16_t two = 0x4000, three = dtype == Dtype::kBFloat16 ? 0x4040 : 0x4200;
  const uint16_t a[2] = {two, three}, b[2] = {three, three};
  float c = -1.0f;
  try {
    block_product(dtype, 1, 1, 2, a, 2, b, 1, &c, 1, /*accumulate=*/false);
    end_block_products();
  } catch (const std::exception&) {
    return false;
  }
  return c == 15.0f;
}

}  // namespace megatron_dppo::cpu
