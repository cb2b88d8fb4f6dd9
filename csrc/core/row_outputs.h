// From a finished reduction to a row's partials, from the shards' partials to the outputs, and to the gradient.
#pragma once

#include "arguments.h"
#include "largest_logit.h"
#include "row_reduction.h"

namespace megatron_dppo {

// The partials of a row that is skipped.
DPPO_HOST_DEVICE void write_no_partials(const PartialsArguments& args, int64_t i) {
  float* out = args.partials + i * (kTopk + args.topk);
  for (int64_t field = 0; field < kTopk + args.topk; ++field) out[field] = 0.f;
}

// Writes the reduction's four fields in units of z. A row that holds NaN or +inf has no softmax: `shifted` is NaN then,
// and spreads to whatever is computed from this row.
DPPO_HOST_DEVICE void write_state(const RowReduction& state, float temperature, float* partials) {
  const float poison = 0.f * state.shifted;
  partials[kMax] = state.max / temperature;
  partials[kRest] = state.rest + poison;
  partials[kTilt] = state.shifted / temperature;
  partials[kSquares] = state.squares + poison;
}

// Sum over shards of a field that all shards but one left at 0. `columns` is the length of a row.
DPPO_HOST_DEVICE float select_over_shards(const MergeArguments& args, int64_t row, int64_t field, int64_t columns) {
  float sum = 0.f;
  for (int64_t shard = 0; shard < args.shards; ++shard) sum += args.partials[(shard * args.n + row) * columns + field];
  return sum;
}

// The outputs of a row that is skipped.
DPPO_HOST_DEVICE void write_no_outputs(const MergeArguments& args, int64_t row) {
  args.log_prob[row] = args.entropy[row] = args.collision[row] = args.max[row] = args.log_sum[row] = 0.f;
  for (int64_t k = 0; k < args.topk; ++k) args.topk_log_prob[row * args.topk + k] = 0.f;
}

// All of a row's outputs but the top K's from its state, in units of z; the gathered z are the fields from `target` on,
// of rows of `columns` fields. With p = softmax(z):
//   log_prob  = (z_target - max) - log1p(rest)  (never z - LSE: LSE's rounding at |z| ~ 70 is 4e-6)
//   entropy   = log1p(rest) - tilt / (1 + rest) (two non-negative terms: nothing cancels)
//   collision = (1 + squares) / (1 + rest)^2
// A row of nothing but -inf has no softmax either: all of its outputs are NaN.
DPPO_HOST_DEVICE void write_statistics(const MergeArguments& args, int64_t row, const RowReduction& total,
                                       int64_t target, int64_t columns) {
  const float poison = 0.f * total.max;
  const float log_sum = log1pf(total.rest) + poison;
  const float inv_sum = 1.f / (1.f + total.rest);
  args.log_prob[row] = (select_over_shards(args, row, target, columns) - total.max) - log_sum;
  args.entropy[row] = log_sum - total.shifted * inv_sum;
  args.collision[row] = (1.f + total.squares) * inv_sum * inv_sum + poison;
  args.max[row] = total.max;
  args.log_sum[row] = log_sum;
}

// The log-probability of the row's k-th top-K token, once its statistics are written.
DPPO_HOST_DEVICE void write_topk(const MergeArguments& args, int64_t row, int64_t k, int64_t target, int64_t columns) {
  args.topk_log_prob[row * args.topk + k] =
      (select_over_shards(args, row, target + 1 + k, columns) - args.max[row]) - args.log_sum[row];
}

// Merges one row's partials over the shards and writes all of its outputs but the top K's. False where the row is
// skipped, and all of them are written.
DPPO_HOST_DEVICE bool finish_statistics(const MergeArguments& args, int64_t row) {
  if (args.mask.skips(row)) {
    write_no_outputs(args, row);
    return false;
  }
  const int64_t columns = kTopk + args.topk;
  RowReduction total;
  for (int64_t shard = 0; shard < args.shards; ++shard) {
    const float* part = args.partials + (shard * args.n + row) * columns;
    total = merge(total, RowReduction{part[kMax], part[kRest], part[kTilt], part[kSquares]}, kLog2E);
  }
  write_statistics(args, row, total, kTarget, columns);
  return true;
}

// The same, and the top K's.
DPPO_HOST_DEVICE void finish_row(const MergeArguments& args, int64_t row) {
  if (!finish_statistics(args, row)) return;
  for (int64_t k = 0; k < args.topk; ++k) write_topk(args, row, k, kTarget, kTopk + args.topk);
}

// The same from the state that tile_tree.h merged, in the units of the logits.
DPPO_HOST_DEVICE void finish_row_of_nodes(const MergeNodesArguments& args, int64_t row, const RowReduction& root) {
  float fields[4];
  write_state(root, args.temperature, fields);
  const RowReduction total{fields[kMax], fields[kRest], fields[kTilt], fields[kSquares]};
  write_statistics(args.merge, row, total, 4 * args.nodes, args.columns());
  for (int64_t k = 0; k < args.merge.topk; ++k) write_topk(args.merge, row, k, 4 * args.nodes, args.columns());
}

// Gradient of grad_log_prob * log_prob + grad_entropy * entropy with respect to the logits x of one row:
//   d/dx_j = (1 / T) [ grad_log_prob ([j = target] - p_j) - grad_entropy p_j (log p_j + entropy) ]
// With y_j = log2 p_j = (x_j - max) log2(e) / T - log2_sum, this is p_j (constant + slope y_j), but at the target.
struct RowGradient {
  float max;  // of the logits, not of z
  float log2_sum;
  float constant, slope;
  float at_target;
  int64_t target_column;  // -1 where another shard holds the target
  bool is_zero;           // nothing flows back: the row is zero-filled without being read
};

DPPO_HOST_DEVICE RowGradient row_gradient(const BackwardArguments& args, int64_t i) {
  RowGradient g{};
  if (args.mask.skips(i)) {
    g.is_zero = true;
    return g;
  }
  const float grad_log_prob = args.grad_log_prob != nullptr ? args.grad_log_prob[i] : 0.f;
  const float grad_entropy = args.grad_entropy != nullptr ? args.grad_entropy[i] : 0.f;
  g.is_zero = grad_log_prob == 0.f && grad_entropy == 0.f;
  if (g.is_zero) return g;
  const float inv_temperature = 1.f / args.temperature;
  const float log_prob = args.log_prob[i];
  g.max = largest_logit(args.max[i], args.temperature, args.logits.dtype);
  g.log2_sum = args.log_sum[i] * kLog2E;
  // Multiplying by 0 and adding hands a NaN on, from a row that has no softmax.
  g.constant = -(grad_log_prob + grad_entropy * args.entropy[i]) * inv_temperature + 0.f * g.log2_sum;
  g.slope = -grad_entropy * inv_temperature / kLog2E;
  // 1 - p from the accurate log-probability: near certainty 1 - exp(...) would be all rounding. Where the target has
  // probability 0, p log p is 0, not 0 * -inf.
  const float p = expf(log_prob);
  const float p_log_p = p == 0.f ? 0.f : p * log_prob;
  g.at_target = inv_temperature * (-grad_log_prob * expm1f(log_prob) - grad_entropy * (p_log_p + p * args.entropy[i]));
  g.target_column = args.target[i] - args.logits.first_column;
  if (g.target_column < 0 || g.target_column >= args.logits.num_columns) g.target_column = -1;
  return g;
}

}  // namespace megatron_dppo
