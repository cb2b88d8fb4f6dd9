// Forward in an order that no layout changes (core/tile_tree.h): a shard's tiles become the nodes of the tree that it
// holds, and the nodes of all shards the outputs.
//
// A tile is read as 128 floats, those beyond the vocabulary -inf, and is always reduced by the same instructions,
// whatever its place in memory. Threads share out rows and nothing less.

#include <ATen/Parallel.h>

#include "kernels.h"
#include "lane_sums.h"
#include "row_tasks.h"
#include "vector_math.h"

#include "../core/dtype_switch.h"
#include "../core/row_outputs.h"
#include "../core/tile_tree.h"

// One copy of a function, which no caller inlines or specialises.
#if defined(__GNUC__) && !defined(__clang__)
#define DPPO_ONE_COPY __attribute__((noipa))
#else
#define DPPO_ONE_COPY __attribute__((noinline))
#endif

namespace megatron_dppo::cpu {
namespace {

static_assert(kTileColumns % kLanes == 0);
constexpr int kLaneTerms = kTileColumns / kLanes;

template <typename T>
DPPO_INLINE RowReduction reduce_tile_of(const T* x, int64_t n, float exp2_scale) {
  alignas(64) float tile[kTileColumns], lanes[kLanes], rest[kLanes], shifted[kLanes], squares[kLanes], at_max[kLanes];
  for (int64_t i = 0; i < n; ++i) tile[i] = to_float(x[i]);
  for (int64_t i = n; i < kTileColumns; ++i) tile[i] = -INFINITY;
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    float max = tile[j];
#pragma GCC unroll 8
    for (int k = 1; k < kLaneTerms; ++k) max = tile[k * kLanes + j] > max ? tile[k * kLanes + j] : max;
    lanes[j] = max;
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
#pragma omp simd
    for (int j = 0; j < width; ++j) lanes[j] = lanes[j + width] > lanes[j] ? lanes[j + width] : lanes[j];
  const float max = lanes[0] + 0.f;  // of 0 and -0, 0
  const float reference = finite_reference(max);
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    float lane_rest = 0.f, lane_shifted = 0.f, lane_squares = 0.f, lane_at_max = 0.f;
#pragma GCC unroll 8
    for (int k = 0; k < kLaneTerms; ++k) {
      const float d = tile[k * kLanes + j] - reference;
      const Exponent power = exp2_nonpositive(d * exp2_scale);
      const float e = d >= 0.f ? 0.f : power.two_to_y;
      lane_at_max += power.two_to_y - e;  // 1 for a maximum, else 0
      lane_rest += e;
      lane_shifted += power.y * e;
      lane_squares += e * e;
    }
    rest[j] = lane_rest, shifted[j] = lane_shifted, squares[j] = lane_squares, at_max[j] = lane_at_max;
  }
  // One occurrence of the maximum stays left out. A tile of nothing but -inf has none.
  const double others = max == -INFINITY ? 0.0 : sum_of(at_max) - 1.0;
  const float tilt = static_cast<float>(sum_of(shifted) / exp2_scale);
  // The comparisons above drop a NaN, which the sums keep: a tile must not pass for an empty one.
  return {max + 0.f * tilt, static_cast<float>(sum_of(rest) + others), tilt,
          static_cast<float>(sum_of(squares) + others)};
}

DPPO_CPU_CLONES RowReduction reduce_tile(const float* x, int64_t n, float exp2_scale) {
  return reduce_tile_of(x, n, exp2_scale);
}
DPPO_CPU_CLONES RowReduction reduce_tile(const BFloat16* x, int64_t n, float exp2_scale) {
  return reduce_tile_of(x, n, exp2_scale);
}
DPPO_CPU_CLONES RowReduction reduce_tile(const Float16* x, int64_t n, float exp2_scale) {
  return reduce_tile_of(x, n, exp2_scale);
}

DPPO_ONE_COPY RowReduction merged(const RowReduction& left, const RowReduction& right, float exp2_scale) {
  return merge_in_tree(left, right, exp2_scale);
}

constexpr int kMostLevels = 64;

// The state of a node of the tree that begins with the row's column `begin`.
template <typename T>
RowReduction reduce_node(const T* row, int64_t begin, int64_t tiles, int64_t columns, float exp2_scale) {
  RowReduction waiting[kMostLevels];
  int depth = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = begin + tile * kTileColumns;
    const int64_t n = std::clamp<int64_t>(columns - first, 0, kTileColumns);
    RowReduction state;
    if (n > 0) state = reduce_tile(row + first, n, exp2_scale);
    for (int64_t index = tile; index % 2 == 1; index /= 2) state = merged(waiting[--depth], state, exp2_scale);
    waiting[depth++] = state;
  }
  return waiting[0];
}

// The logit of a global id, or 0 where another shard holds it.
template <typename T>
float gather(const LogitsShard& logits, const T* row, int64_t id, float temperature) {
  const int64_t column = id - logits.first_column;
  return column >= 0 && column < logits.num_columns ? to_float(row[column]) / temperature : 0.f;
}

template <typename T>
void write_row(const TileNodesArguments& args, int64_t i) {
  const LogitsShard& logits = args.row.logits;
  const int64_t topk = args.row.topk;
  const T* row = static_cast<const T*>(logits.data) + args.row.selection.row(i) * logits.row_stride;
  const float exp2_scale = kLog2E / args.row.temperature;
  float* out = args.row.partials + i * (kNodeFields * args.nodes + 1 + topk);
  float* const end_of_nodes = out + kNodeFields * args.nodes;
  const int64_t first_tile = logits.first_column / kTileColumns, end_tile = first_tile + args.num_tiles;
  for (int64_t tile = first_tile; tile < end_tile; out += kNodeFields) {
    const int64_t tiles = node_tiles(tile, end_tile), begin = (tile - first_tile) * kTileColumns;
    write_node(reduce_node(row, begin, tiles, logits.num_columns, exp2_scale), out);
    tile += tiles;
  }
  for (; out < end_of_nodes; out += kNodeFields) write_node(RowReduction(), out);
  *out++ = gather(logits, row, args.row.target[i], args.row.temperature);
  for (int64_t k = 0; k < topk; ++k)
    *out++ = gather(logits, row, args.row.topk_ids[i * topk + k], args.row.temperature);
}

}  // namespace

void tile_nodes(const TileNodesArguments& args) {
  const int64_t columns = kNodeFields * args.nodes + 1 + args.row.topk;
  const int64_t grain = std::max<int64_t>(kGrainElements / std::max<int64_t>(args.row.logits.num_columns, 1), 1);
  at::parallel_for(0, args.row.selection.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (args.row.selection.skips(i))
        std::fill_n(args.row.partials + i * columns, columns, 0.f);
      else
        switch_dtype(args.row.logits.dtype, CpuElements(),
                     [&](auto tag) { write_row<typename decltype(tag)::Type>(args, i); });
    }
  });
}

void merge_tile_nodes(const MergeNodesArguments& args) {
  const float exp2_scale = kLog2E / args.temperature;
  at::parallel_for(0, args.merge.n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (args.merge.mask.skips(row)) {
        write_no_outputs(args.merge, row);
        continue;
      }
      RowReduction waiting[kMostLevels];
      const RowReduction root = merge_nodes(
          args, row, [&](int64_t level) -> RowReduction& { return waiting[level]; },
          [&](const RowReduction& left, const RowReduction& right) { return merged(left, right, exp2_scale); });
      finish_row_of_nodes(args, row, root);
    }
  });
}

}  // namespace megatron_dppo::cpu
