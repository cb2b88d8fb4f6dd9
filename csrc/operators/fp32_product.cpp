// The operator that multiplies 16-bit matrices with an fp32 result, on a CPU: elsewhere torch has it.

#include "core/fp32_product_arguments.h"
#include "cpu/kernels.h"
#include "operators/checks.h"
#include "operators/operators.h"

namespace megatron_dppo {

namespace {

HalfMatrix check_factor(const char* name, const Tensor& factor, const Tensor& sums, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(factor.scalar_type() == at::kBFloat16 || factor.scalar_type() == at::kHalf, name,
                    " must be a 16-bit matrix, bfloat16 or float16, not ", factor.scalar_type());
  TORCH_CHECK_VALUE(factor.dim() == 2 && factor.size(0) == rows && factor.size(1) == columns, name,
                    " must have shape [", rows, ", ", columns, "], not ", factor.sizes(), "; sums have ", sums.sizes());
  // A single row or column may have any stride: it is not stepped by.
  const int64_t column_stride = columns > 1 ? factor.stride(1) : 1;
  const int64_t row_stride = rows > 1 || column_stride == 1 ? factor.stride(0) : 1;
  TORCH_CHECK_VALUE(row_stride == 1 || column_stride == 1, name,
                    " must have contiguous rows or columns; its strides are ", factor.strides());
  return {static_cast<const uint16_t*>(factor.const_data_ptr()), row_stride, column_stride};
}

}  // namespace

void fp32_product_(const Tensor& sums, const Tensor& a, const Tensor& b, bool accumulate) {
  TORCH_CHECK_VALUE(a.dim() == 2, "a must be a matrix [m, k], not ", a.sizes());
  check_matrix("sums", sums);
  check_rows_apart("sums", sums);
  TORCH_CHECK_VALUE(sums.scalar_type() == at::kFloat, "sums must be float32, not ", sums.scalar_type());
  TORCH_CHECK_VALUE(a.scalar_type() == b.scalar_type(), "a is ", a.scalar_type(), ", b ", b.scalar_type());
  const int64_t m = sums.size(0), n = sums.size(1), k = a.size(1);
  const HalfMatrix factor_a = check_factor("a", a, sums, m, k), factor_b = check_factor("b", b, sums, k, n);
  const Dtype dtype = dtype_of(a);
  TORCH_CHECK_NOT_IMPLEMENTED(cpu::has_fp32_product(dtype), "this processor multiplies no ", a.scalar_type(),
                              " matrices by itself");
  cpu::fp32_product({dtype, m, n, k, factor_a, factor_b, sums.mutable_data_ptr<float>(), sums.stride(0), accumulate});
}

}  // namespace megatron_dppo
