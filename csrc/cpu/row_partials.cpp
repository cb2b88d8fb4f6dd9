// Forward, step 1: one read of each row of a shard gives its reduction and the gathered logits.
//
// A row is taken in chunks that stay in the first-level cache. A chunk is read twice, once for its maximum (while the
// chunk before it is summed) and once for the sums, so that the inner loops carry no rescaling and vectorise.

#include <vector>

#include "kernels.h"
#include "row_tasks.h"
#include "vector_math.h"

#include "../core/dtype_switch.h"
#include "../core/row_outputs.h"

namespace megatron_dppo::cpu {
namespace {

constexpr int64_t kChunk = 2048;
constexpr int64_t kBlock = 512;  // of a chunk: what is added up in single precision
constexpr int kTree = 8;

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

// What the terms of some elements add up to.
struct Terms {
  float rest = 0.f, shifted = 0.f, squares = 0.f;  // `shifted` in units of log2
  float at_max = 0.f;                              // how many elements equal the maximum, which are in no other sum

  DPPO_INLINE friend Terms operator+(const Terms& a, const Terms& b) {
    return {a.rest + b.rest, a.shifted + b.shifted, a.squares + b.squares, a.at_max + b.at_max};
  }
};

// The terms of x[0], x[stride], ..., x[(N - 1) stride], added up pairwise. HoldsMax: some may equal the reference.
template <bool HoldsMax, int N>
DPPO_INLINE Terms terms_of(const float* x, int64_t stride, float reference, float exp2_scale) {
  if constexpr (N > 1) {
    return terms_of<HoldsMax, N / 2>(x, stride, reference, exp2_scale) +
           terms_of<HoldsMax, N / 2>(x + N / 2 * stride, stride, reference, exp2_scale);
  } else {
    const float d = *x - reference;
    const Exponent power = exp2_nonpositive(d * exp2_scale);
    const float e = HoldsMax && d >= 0.f ? 0.f : power.two_to_y;
    return {e, power.y * e, e * e, HoldsMax ? power.two_to_y - e : 0.f};
  }
}

template <int N>
DPPO_INLINE float max_of(const float* x, int64_t stride, float max) {
  for (int k = 0; k < N; ++k) max = x[k * stride] > max ? x[k * stride] : max;
  return max;
}

// A row's state while its chunks are added.
struct ChunkSums {
  float max = -INFINITY;
  double rest = 0.0, shifted = 0.0, squares = 0.0;  // as in RowReduction, but for shifted's unit

  // A new, finite maximum: the former one becomes an ordinary element.
  void raise_max(float new_max, float exp2_scale) {
    const double step = static_cast<double>(shift_by_max(max, new_max)) * exp2_scale, decay = std::exp2(step);
    shifted = decay * (shifted + step * (1.0 + rest));
    rest = decay * (1.0 + rest);
    squares = decay * decay * (1.0 + squares);
    max = new_max;
  }
};

// Adds the terms of a chunk, `reference` being no less than any of its values. HoldsMax: some may equal it; one
// occurrence of the row's maximum is then left out of the sums, in this chunk or (found before) in an earlier one.
// Returns the maximum of the n values at `next`: read here, their way from memory overlaps with the arithmetic.
//
// Rounding: a sum of m numbers in turn is off by up to m half units in the last place, and where they are all alike, as
// near certainty, that is not far from what happens. So few are added in turn: 8 by a tree, kBlock / 8 / lanes such in
// each lane (8 with AVX2), the lanes by a tree, and blocks in double precision.
template <bool HoldsMax>
DPPO_INLINE float add_chunk(ChunkSums& sums, bool max_is_new, const float* x, const float* next, int64_t n,
                            float reference, float exp2_scale) {
  double at_max = 0.0;
  float next_max = -INFINITY;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t length = n - begin < kBlock ? n - begin : kBlock, stride = length / kTree;
    float rest = 0.f, shifted = 0.f, squares = 0.f, equal = 0.f;
    const auto add = [&](const Terms& terms) __attribute__((always_inline)) {
      rest += terms.rest;
      shifted += terms.shifted;
      squares += terms.squares;
      equal += terms.at_max;
    };
#pragma omp simd reduction(+ : rest, shifted, squares, equal) reduction(max : next_max)
    for (int64_t i = 0; i < stride; ++i) {
      add(terms_of<HoldsMax, kTree>(x + begin + i, stride, reference, exp2_scale));
      next_max = max_of<kTree>(next + begin + i, stride, next_max);
    }
    for (int64_t i = begin + kTree * stride; i < begin + length; ++i) {
      add(terms_of<HoldsMax, 1>(x + i, 0, reference, exp2_scale));
      next_max = max_of<1>(next + i, 0, next_max);
    }
    sums.rest += rest;
    sums.shifted += shifted;
    sums.squares += squares;
    at_max += equal;
  }
  if (HoldsMax) {
    const double others = max_is_new ? at_max - 1.0 : at_max;
    sums.rest += others;
    sums.squares += others;
  }
  return next_max;
}

template <typename T>
DPPO_INLINE RowReduction reduce_chunks(const T* row, int64_t n, float exp2_scale) {
  alignas(64) float scratch[2][kChunk];
  ChunkSums sums;
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
    if (max > sums.max) {
      sums.raise_max(max, exp2_scale);
      next_max = add_chunk<true>(sums, true, x, ahead, length, max, exp2_scale);
    } else if (max == sums.max && max != -INFINITY) {
      next_max = add_chunk<true>(sums, false, x, ahead, length, max, exp2_scale);
    } else {
      // Also a chunk of nothing but -inf and NaN: its terms are 0 or NaN, and NaN must not be lost.
      next_max = add_chunk<false>(sums, false, x, ahead, length, finite_reference(sums.max), exp2_scale);
    }
    max = ahead == next ? next_max : chunk_max(next, next_length);
    x = next;
  }
  return {sums.max, static_cast<float>(sums.rest), static_cast<float>(sums.shifted / exp2_scale),
          static_cast<float>(sums.squares)};
}

DPPO_CPU_CLONES RowReduction reduce(const float* x, int64_t n, float exp2_scale) {
  return reduce_chunks(x, n, exp2_scale);
}
DPPO_CPU_CLONES RowReduction reduce(const BFloat16* x, int64_t n, float exp2_scale) {
  return reduce_chunks(x, n, exp2_scale);
}
DPPO_CPU_CLONES RowReduction reduce(const Float16* x, int64_t n, float exp2_scale) {
  return reduce_chunks(x, n, exp2_scale);
}

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
  const float exp2_scale = kLog2E / args.temperature;
  const auto logits_row = [&](int64_t i) {
    return static_cast<const T*>(args.logits.data) + args.selection.row(i) * args.logits.row_stride;
  };
  for (int64_t i : rows_of_mask(args.selection.mask, args.selection.n, false)) write_no_partials(args, i);
  const std::vector<int64_t> inside = rows_of_mask(args.selection.mask, args.selection.n, true);
  const int64_t n = inside.size(), columns = args.logits.num_columns;
  const RowCut cut(n, columns);
  if (cut.segments == 1) {
    for_each_segment(n, columns, cut, [&](int64_t k, int64_t, int64_t begin, int64_t end) {
      const T* row = logits_row(inside[k]);
      write_row(args, row, inside[k], reduce(row + begin, end - begin, exp2_scale));
    });
    return;
  }
  std::vector<RowReduction> parts(n * cut.segments);
  for_each_segment(n, columns, cut, [&](int64_t k, int64_t segment, int64_t begin, int64_t end) {
    parts[k * cut.segments + segment] = reduce(logits_row(inside[k]) + begin, end - begin, exp2_scale);
  });
  for (int64_t k = 0; k < n; ++k) {
    RowReduction state;
    for (int64_t segment = 0; segment < cut.segments; ++segment)
      state = merge(state, parts[k * cut.segments + segment], exp2_scale);
    write_row(args, logits_row(inside[k]), inside[k], state);
  }
}

}  // namespace

void row_partials(const PartialsArguments& args) {
  switch_dtype(args.logits.dtype, CpuElements(),
               [&](auto tag) { row_partials_of<typename decltype(tag)::Type>(args); });
}

}  // namespace megatron_dppo::cpu
