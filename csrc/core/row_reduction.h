// The state of an online softmax over a part of one row of logits: how values enter it, and how two states merge.
//
// Shared by the CUDA kernels, their host emulation and the CPU kernels. Every sum is over exp((x - max) / T), T being
// the temperature; `max` and `shifted` stay in units of the raw logits, so that a temperature costs no extra operation
// per element and the difference x - max is exact where it matters. `exp2_scale` is log2(e) / T everywhere.
#pragma once

#include "platform.h"

namespace megatron_dppo {

struct RowReduction {
  float max = -INFINITY;
  // Sum of exp((x - max) / T) over every element but ONE occurrence of the maximum, whose own term is exactly 1. Near
  // certainty this sum is far below fp32's resolution at 1: with the 1 left out, log1p(rest) keeps 1 - pi accurate.
  float rest = 0.f;
  float shifted = 0.f;  // sum of (x - max) exp((x - max) / T); the maximum's own term is 0
  float squares = 0.f;  // sum of exp(2 (x - max) / T), without the same occurrence of the maximum
};

// x - max for x <= max, never -inf: exp of the floor is 0, and 0 times a finite floor is 0 where 0 * inf would be NaN.
// `max` must have passed through finite_reference, so that -inf minus -inf does not occur. NaN stays NaN.
DPPO_HOST_DEVICE float shift_by_max(float x, float max) { return nan_max(x - max, -1e30f); }
DPPO_HOST_DEVICE float finite_reference(float max) { return nan_max(max, kLowestFloat); }

// Adds N values at the price of one rescaling. Destroys `x`.
//
// A tournament finds the maximum and leaves each comparison's loser in place: N + 1 values (the former maximum is one
// of them), N losers. The losers are exactly "every element but one occurrence of the maximum", without a branch.
template <int N>
DPPO_HOST_DEVICE void insert(RowReduction& state, float (&x)[N], float exp2_scale) {
  static_assert((N & (N - 1)) == 0, "a tournament of 2^k values");
  DPPO_UNROLL
  for (int stride = 1; stride < N; stride *= 2) {
    DPPO_UNROLL
    for (int i = 0; i < N; i += 2 * stride) {
      const float loser = nan_min(x[i], x[i + stride]);
      x[i] = nan_max(x[i], x[i + stride]);
      x[i + stride] = loser;
    }
  }
  const float max = nan_max(state.max, x[0]);
  x[0] = nan_min(state.max, x[0]);

  const float reference = finite_reference(max);
  const float step = shift_by_max(state.max, reference);
  const float decay = exp2f(step * exp2_scale);
  float rest = decay * state.rest;
  float shifted = decay * (state.shifted + step * state.rest);
  float squares = decay * decay * state.squares;
  DPPO_UNROLL
  for (int i = 0; i < N; ++i) {
    const float d = shift_by_max(x[i], reference);
    const float e = exp2f(d * exp2_scale);
    rest += e;
    shifted += d * e;
    squares += e * e;
  }
  state = {max, rest, shifted, squares};
}

// The state of the union of two disjoint parts of a row. Either may be empty (max = -inf).
DPPO_HOST_DEVICE RowReduction merge(const RowReduction& a, const RowReduction& b, float exp2_scale) {
  const float max = nan_max(a.max, b.max);
  const float reference = finite_reference(max);
  const float step_a = shift_by_max(a.max, reference), decay_a = exp2f(step_a * exp2_scale);
  const float step_b = shift_by_max(b.max, reference), decay_b = exp2f(step_b * exp2_scale);
  // The smaller maximum becomes an ordinary element; the larger one keeps its place outside the sums.
  const float d = shift_by_max(nan_min(a.max, b.max), reference), e = exp2f(d * exp2_scale);
  return {max, decay_a * a.rest + decay_b * b.rest + e,
          decay_a * (a.shifted + step_a * a.rest) + decay_b * (b.shifted + step_b * b.rest) + d * e,
          decay_a * decay_a * a.squares + decay_b * decay_b * b.squares + e * e};
}

}  // namespace megatron_dppo
