// Backward: one read and one write of each row that something flows back through, one write of the others.

#include "kernels.h"
#include "logits_row.h"
#include "row_tasks.h"

#include "../core/dtype_switch.h"
#include "../core/row_outputs.h"

namespace megatron_dppo::cpu {
namespace {

// `x` and `out` may be the same memory: element i is written after it was read and never read again.
template <bool HasEntropy, typename T>
DPPO_INLINE void write_values(const T* x, T* out, int64_t n, const RowGradient& row, float exp2_scale) {
  const float max = row.max, log2_sum = row.log2_sum, constant = row.constant, slope = row.slope;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Exponent p = exp2_nonpositive((to_float(x[i]) - max) * exp2_scale - log2_sum);
    const float coefficient = HasEntropy ? constant + slope * p.y : constant;
    out[i] = from_float<T>(p.two_to_y * coefficient);
  }
}

template <typename T>
DPPO_INLINE void write_row_segment(const T* x, T* out, int64_t n, const RowGradient& row, float exp2_scale) {
  if (row.slope != 0.f)
    write_values<true>(x, out, n, row, exp2_scale);
  else
    write_values<false>(x, out, n, row, exp2_scale);
}

}  // namespace

DPPO_CPU_CLONES void backward(const float* x, float* out, int64_t n, const RowGradient& row, float scale) {
  write_row_segment(x, out, n, row, scale);
}
DPPO_CPU_CLONES void backward(const BFloat16* x, BFloat16* out, int64_t n, const RowGradient& row, float scale) {
  write_row_segment(x, out, n, row, scale);
}
DPPO_CPU_CLONES void backward(const Float16* x, Float16* out, int64_t n, const RowGradient& row, float scale) {
  write_row_segment(x, out, n, row, scale);
}

namespace {

template <typename T>
void policy_backward_of(const BackwardArguments& args) {
  const LogitsShard& logits = args.logits;
  const float exp2_scale = kLog2E / args.temperature;
  const auto gradient_row = [&](int64_t i) { return static_cast<T*>(args.grad_logits) + i * args.grad_row_stride; };
  const std::vector<int64_t> outside = rows_of_mask(args.mask, args.n, false);
  const RowCut zero_cut(outside.size(), logits.columns);
  for_each_segment(outside.size(), logits.columns, zero_cut, [&](int64_t k, int64_t, int64_t begin, int64_t end) {
    std::memset(static_cast<void*>(gradient_row(outside[k]) + begin), 0, (end - begin) * sizeof(T));
  });
  const std::vector<int64_t> inside = rows_of_mask(args.mask, args.n, true);
  const RowCut cut(inside.size(), logits.columns);
  for_each_segment(inside.size(), logits.columns, cut, [&](int64_t k, int64_t, int64_t begin, int64_t end) {
    const int64_t i = inside[k];
    const T* x = static_cast<const T*>(logits.data) + i * logits.row_stride;
    T* out = gradient_row(i);
    const RowGradient row = row_gradient(args, i);
    write_gradient(x, out, begin, end, logits.num_columns, row, exp2_scale);
  });
}

}  // namespace

void policy_backward(const BackwardArguments& args) {
  switch_dtype(args.logits.dtype, CpuElements(),
               [&](auto tag) { policy_backward_of<typename decltype(tag)::Type>(args); });
}

}  // namespace megatron_dppo::cpu
