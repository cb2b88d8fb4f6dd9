// Forward, step 1: one read of each row of a shard gives its reduction and the gathered logits.
//
// A row is taken in chunks that stay in the first-level cache. A chunk is read twice, once for its maximum (while the
// chunk before it is summed) and once for the sums, so that the inner loops carry no rescaling and vectorise.

#include <vector>

#include "kernels.h"
#include "row_tasks.h"
#include "vector_math.h"

#include "../core/row_outputs.h"

namespace megatron_dppo::cpu {
namespace {

constexpr int64_t kChunk = 2048;

// The chunk as floats: itself, or unpacked into `scratch`, as reductions over 16-bit loads do not vectorise well.
DPPO_INLINE const float* unpack(const float* x, int64_t, float*) { return x; }
template <typename T>
DPPO_INLINE const float* unpack(const T* x, int64_t n, float* scratch) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) scratch[i] = to_float(x[i]);
  return scratch;
}

// Many running maxima, side by side: with a single one, every step would wait for the step before.
DPPO_INLINE float chunk_max(const float* x, int64_t n) {
  constexpr int64_t kLanes = 64;
  alignas(64) float lanes[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) lanes[j] = -INFINITY;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  float max = -INFINITY;
  for (; i < n; ++i) max = x[i] > max ? x[i] : max;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < kLanes; ++j) max = lanes[j] > max ? lanes[j] : max;
  return max;
}

// Adds the terms of a chunk, `reference` being no less than any of its values. HoldsMax: some may equal it; one
// occurrence of the row's maximum is then left out of the sums, in this chunk or (found before) in an earlier one.
// Returns the maximum of the n values at `next`: read here, their way from memory overlaps with the arithmetic.
template <bool HoldsMax>
DPPO_INLINE float add_chunk(RowReduction& state, bool max_is_new, const float* x, const float* next, int64_t n,
                            float reference, float exp2_scale) {
  float rest = 0.f, shifted = 0.f, squares = 0.f, at_max = 0.f, next_max = -INFINITY;
#pragma omp simd reduction(+ : rest, shifted, squares, at_max) reduction(max : next_max)
  for (int64_t i = 0; i < n; ++i) {
    const float d = x[i] - reference;
    const Exponent power = exp2_nonpositive(d * exp2_scale);
    float e = power.two_to_y;
    if (HoldsMax) {
      e = d >= 0.f ? 0.f : e;
      at_max += power.two_to_y - e;  // 1 for a maximum, else 0
    }
    rest += e;
    shifted += power.y * e;
    squares += e * e;
    next_max = next[i] > next_max ? next[i] : next_max;
  }
  if (HoldsMax) {
    const float others = max_is_new ? at_max - 1.f : at_max;
    rest += others;
    squares += others;
  }
  state.rest += rest;
  state.shifted += shifted / exp2_scale;
  state.squares += squares;
  return next_max;
}

template <typename T>
DPPO_INLINE RowReduction reduce_chunks(const T* row, int64_t n, float exp2_scale) {
  alignas(64) float scratch[2][kChunk];
  RowReduction state;
  const float* x = unpack(row, n < kChunk ? n : kChunk, scratch[0]);
  float max = chunk_max(x, n < kChunk ? n : kChunk);
  int parity = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t length = n - begin < kChunk ? n - begin : kChunk;
    const int64_t next_length = n - begin - length < kChunk ? n - begin - length : kChunk;
    parity ^= 1;
    const float* next = unpack(row + begin + length, next_length, scratch[parity]);
    const float* ahead = next_length == length ? next : x;  // a last, shorter chunk is left to chunk_max
    float next_max;
    if (max > state.max) {
      state = merge(state, RowReduction{max}, exp2_scale);  // the former maximum joins the sums
      next_max = add_chunk<true>(state, true, x, ahead, length, max, exp2_scale);
    } else if (max == state.max && max != -INFINITY) {
      next_max = add_chunk<true>(state, false, x, ahead, length, max, exp2_scale);
    } else {
      // Also a chunk of nothing but -inf and NaN: its terms are 0 or NaN, and NaN must not be lost.
      next_max = add_chunk<false>(state, false, x, ahead, length, finite_reference(state.max), exp2_scale);
    }
    max = ahead == next ? next_max : chunk_max(next, next_length);
    x = next;
  }
  return state;
}

DPPO_CPU_CLONES RowReduction reduce_float32(const float* x, int64_t n, float exp2_scale) {
  return reduce_chunks(x, n, exp2_scale);
}
DPPO_CPU_CLONES RowReduction reduce_bfloat16(const BFloat16* x, int64_t n, float exp2_scale) {
  return reduce_chunks(x, n, exp2_scale);
}
DPPO_CPU_CLONES RowReduction reduce_float16(const Float16* x, int64_t n, float exp2_scale) {
  return reduce_chunks(x, n, exp2_scale);
}

RowReduction reduce(const float* x, int64_t n, float scale) { return reduce_float32(x, n, scale); }
RowReduction reduce(const BFloat16* x, int64_t n, float scale) { return reduce_bfloat16(x, n, scale); }
RowReduction reduce(const Float16* x, int64_t n, float scale) { return reduce_float16(x, n, scale); }

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

template <typename T>
void row_partials_of(const PartialsArguments& args) {
  const int64_t n = args.selection.n, columns = args.logits.num_columns;
  const float exp2_scale = kLog2E / args.temperature;
  const RowCut cut(n, columns);
  const auto logits_row = [&](int64_t i) {
    const int64_t row = args.selection.rows != nullptr ? args.selection.rows[i] : i;
    return static_cast<const T*>(args.logits.data) + row * args.logits.row_stride;
  };
  if (cut.segments == 1) {
    for_each_segment(n, columns, cut, [&](int64_t i, int64_t, int64_t begin, int64_t end) {
      write_row(args, logits_row(i), i, reduce(logits_row(i) + begin, end - begin, exp2_scale));
    });
    return;
  }
  std::vector<RowReduction> parts(n * cut.segments);
  for_each_segment(n, columns, cut, [&](int64_t i, int64_t segment, int64_t begin, int64_t end) {
    parts[i * cut.segments + segment] = reduce(logits_row(i) + begin, end - begin, exp2_scale);
  });
  for (int64_t i = 0; i < n; ++i) {
    RowReduction state;
    for (int64_t segment = 0; segment < cut.segments; ++segment)
      state = merge(state, parts[i * cut.segments + segment], exp2_scale);
    write_row(args, logits_row(i), i, state);
  }
}

}  // namespace

void row_partials(const PartialsArguments& args) {
  switch (args.logits.dtype) {
    case Dtype::kFloat32:
      return row_partials_of<float>(args);
    case Dtype::kBFloat16:
      return row_partials_of<BFloat16>(args);
    case Dtype::kFloat16:
      return row_partials_of<Float16>(args);
  }
}

}  // namespace megatron_dppo::cpu
