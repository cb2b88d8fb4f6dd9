// What is done with one row of logits, or with a segment of one: the steps that the kernels put together.
#pragma once

#include <algorithm>
#include <cstring>

#include "../core/row_outputs.h"
#include "vector_math.h"

namespace megatron_dppo::cpu {

// The reduction of n values (row_partials.cpp).
RowReduction reduce(const float* x, int64_t n, float exp2_scale);
RowReduction reduce(const BFloat16* x, int64_t n, float exp2_scale);
RowReduction reduce(const Float16* x, int64_t n, float exp2_scale);

// The gradient of n values but for the target's, into `out`, which may be `x` (policy_backward.cpp).
void backward(const float* x, float* out, int64_t n, const RowGradient& row, float exp2_scale);
void backward(const BFloat16* x, BFloat16* out, int64_t n, const RowGradient& row, float exp2_scale);
void backward(const Float16* x, Float16* out, int64_t n, const RowGradient& row, float exp2_scale);

// The logit of a global id, or 0 where another shard holds it.
template <typename T>
float gather(const PartialsArguments& args, const T* row, int64_t id) {
  const int64_t column = id - args.logits.first_column;
  return column >= 0 && column < args.logits.num_columns ? to_float(row[column]) / args.temperature : 0.f;
}

template <typename T>
void write_row(const PartialsArguments& args, const T* row, int64_t i, const RowReduction& state) {
  float* out = args.partials + i * (kTopk + args.topk);
  write_state(state, args.temperature, out);
  out[kTarget] = gather(args, row, args.target[i]);
  for (int64_t k = 0; k < args.topk; ++k) out[kTopk + k] = gather(args, row, args.topk_ids[i * args.topk + k]);
}

// The gradient of columns [begin, end) of a row, padding from num_columns on included.
template <typename T>
void write_gradient(const T* x, T* out, int64_t begin, int64_t end, int64_t num_columns, const RowGradient& row,
                    float exp2_scale) {
  const int64_t valid_end = row.is_zero ? begin : std::max(begin, std::min(end, num_columns));
  backward(x + begin, out + begin, valid_end - begin, row, exp2_scale);
  std::memset(static_cast<void*>(out + valid_end), 0, (end - valid_end) * sizeof(T));
  if (!row.is_zero && row.target_column >= begin && row.target_column < valid_end)
    out[row.target_column] = from_float<T>(row.at_target);
}

}  // namespace megatron_dppo::cpu
