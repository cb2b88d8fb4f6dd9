// Forward, step 1: one read of each row of a shard gives its reduction and the gathered logits.
//
// A row is taken in chunks that stay in the first-level cache. A chunk is read twice, once for its maximum (while the
// chunk before it is summed) and once for the sums, so that the inner loops carry no rescaling and vectorise.

#include <vector>

#include "kernels.h"
#include "lane_sums.h"
#include "logits_row.h"
#include "row_tasks.h"

#include "../core/dtype_switch.h"
#include "../core/row_outputs.h"

namespace megatron_dppo::cpu {
namespace {

constexpr int64_t kChunk = 2048;

// With the lanes of lane_sums.h no term of a chunk passes through more than kDepth - 1 + kChunk / (kDepth * kLanes) +
// log2(kLanes / 8) = 17 roundings; in the row's last chunk, which may not be full, through kDepth - 1 more. Chunks are
// added in double precision: however long the row.
static_assert(kDepth == 8 && kLanes == 32 && kChunk == 2048);

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

// Sums side by side, and maxima of what was read ahead.
struct Lanes {
  alignas(64) float rest[kLanes], shifted[kLanes], squares[kLanes], at_max[kLanes], next_max[kLanes];
};

// Adds the terms of Depth elements to each of n lanes, `reference` being no less than any element. HoldsMax: some may
// equal it; they are left out of the sums, and counted. `next` is read here so that its way from memory overlaps with
// the arithmetic.
template <bool HoldsMax, int Depth>
DPPO_INLINE void add_block(Lanes& lanes, const float* x, const float* next, int64_t n, float reference,
                           float exp2_scale) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    float rest = 0.f, shifted = 0.f, squares = 0.f, at_max = 0.f, next_max = lanes.next_max[j];
#pragma GCC unroll 8
    for (int k = 0; k < Depth; ++k) {
      const float d = x[k * n + j] - reference;
      const Exponent power = exp2_nonpositive(d * exp2_scale);
      float e = power.two_to_y;
      if (HoldsMax) {
        e = d >= 0.f ? 0.f : e;
        at_max += power.two_to_y - e;  // 1 for a maximum, else 0
      }
      rest += e;
      shifted += power.y * e;
      squares += e * e;
      next_max = next[k * n + j] > next_max ? next[k * n + j] : next_max;
    }
    lanes.rest[j] += rest;
    lanes.shifted[j] += shifted;
    lanes.squares[j] += squares;
    if (HoldsMax) lanes.at_max[j] += at_max;
    lanes.next_max[j] = next_max;
  }
}

// Adds the terms of a chunk. One occurrence of the row's maximum stays left out, in this chunk or (found before) in an
// earlier one; others that equal it count. Returns the maximum of the n values at `next`.
template <bool HoldsMax>
DPPO_INLINE float add_chunk(ChunkSums& sums, bool max_is_new, const float* x, const float* next, int64_t n,
                            float reference, float exp2_scale) {
  Lanes lanes{};
  for (int j = 0; j < kLanes; ++j) lanes.next_max[j] = -INFINITY;
  int64_t i = 0;
  for (; i + kDepth * kLanes <= n; i += kDepth * kLanes)
    add_block<HoldsMax, kDepth>(lanes, x + i, next + i, kLanes, reference, exp2_scale);
  for (; i < n; i += kLanes)
    add_block<HoldsMax, 1>(lanes, x + i, next + i, n - i < kLanes ? n - i : kLanes, reference, exp2_scale);
  sums.rest += sum_of(lanes.rest);
  sums.shifted += sum_of(lanes.shifted);
  sums.squares += sum_of(lanes.squares);
  if (HoldsMax) {
    const double at_max = sum_of(lanes.at_max), others = max_is_new ? at_max - 1.0 : at_max;
    sums.rest += others;
    sums.squares += others;
  }
  float next_max = -INFINITY;
#pragma omp simd reduction(max : next_max)
  for (int j = 0; j < kLanes; ++j) next_max = lanes.next_max[j] > next_max ? lanes.next_max[j] : next_max;
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

}  // namespace

DPPO_CPU_CLONES RowReduction reduce(const float* x, int64_t n, float exp2_scale) {
  return reduce_chunks(x, n, exp2_scale);
}
DPPO_CPU_CLONES RowReduction reduce(const BFloat16* x, int64_t n, float exp2_scale) {
  return reduce_chunks(x, n, exp2_scale);
}
DPPO_CPU_CLONES RowReduction reduce(const Float16* x, int64_t n, float exp2_scale) {
  return reduce_chunks(x, n, exp2_scale);
}

namespace {

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
