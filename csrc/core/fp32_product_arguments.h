// Arguments of the product of 16-bit matrices with an fp32 result.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace megatron_dppo {

// A matrix of 16-bit elements of which rows or columns are next to each other in memory.
struct HalfMatrix {
  const uint16_t* data;
  int64_t row_stride, column_stride;  // elements; at least one of them is 1

  const uint16_t* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

struct Fp32ProductArguments {
  Dtype dtype;  // of both factors: bfloat16 or float16
  int64_t m, n, k;
  HalfMatrix a;             // [m, k]
  HalfMatrix b;             // [k, n]
  float* sums;              // [m, n]  OUT: a @ b, or added to
  int64_t sums_row_stride;  // elements
  bool accumulate;
};

}  // namespace megatron_dppo
