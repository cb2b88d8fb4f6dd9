// Statistics that are the same bits in every layout: a row is reduced in tiles of 128 global columns, and these are
// merged along one fixed binary tree over the global tile index, whoever holds them.
//
// The tree is the perfect one of the next power of two. A tile that is absent (beyond the vocabulary) is the empty
// state, and merging with that returns the other side's bits, so the tree may be taken as large as one likes. A shard
// holds a run of tiles [first, end), which is a few whole nodes of the tree: at each tile the largest that begins there
// and fits. Ranks exchange these nodes, and each of them merges the rest of the tree.
//
// What a merge returns must not depend on where it is compiled: one node is made by the kernel that reads logits in one
// layout, by the one that merges in another. So no product in it may be fused with a sum, and the CPU kernels call one
// copy.
#pragma once

#include "arguments.h"
#include "row_reduction.h"

namespace megatron_dppo {

constexpr int64_t kTileColumns = 128;
constexpr int64_t kNodeFields = 4;  // max, rest, shifted, squares as in RowReduction, in the units of the logits

// A product and a sum that are rounded, each by itself: compilers fuse them as it suits the code around.
DPPO_HOST_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
DPPO_HOST_DEVICE float rounded_sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// The state of a parent of the tree. All sums are of terms of one sign, so that nothing cancels.
DPPO_HOST_DEVICE RowReduction merge_in_tree(const RowReduction& left, const RowReduction& right, float exp2_scale) {
  if (right.max == -INFINITY) return left;
  if (left.max == -INFINITY) return right;
  const bool left_leads = left.max >= right.max;
  // Field by field: a reference to either would put both into a GPU's local memory.
  const auto pick = [](bool first, const RowReduction& a, const RowReduction& b) {
    return RowReduction{first ? a.max : b.max, first ? a.rest : b.rest, first ? a.shifted : b.shifted,
                        first ? a.squares : b.squares};
  };
  const RowReduction high = pick(left_leads, left, right), low = pick(left_leads, right, left);
  // The smaller maximum becomes an ordinary element; NaN leads or follows, and spreads either way.
  const float d = shift_by_max(low.max, finite_reference(high.max));
  const float e = exp2f(rounded_product(d, exp2_scale));
  const float elements = rounded_sum(low.rest, 1.f);
  const float moved = rounded_sum(low.shifted, rounded_product(d, elements));
  const float squares = rounded_product(rounded_product(e, e), rounded_sum(low.squares, 1.f));
  return {nan_max(left.max, right.max), rounded_sum(high.rest, rounded_product(e, elements)),
          rounded_sum(high.shifted, rounded_product(e, moved)), rounded_sum(high.squares, squares)};
}

// Tiles of the largest node that begins at tile `first` and ends by `end`.
DPPO_HOST_DEVICE int64_t node_tiles(int64_t first, int64_t end) {
  int64_t tiles = 1;
  while (first % (2 * tiles) == 0 && first + 2 * tiles <= end) tiles *= 2;
  return tiles;
}

inline int64_t count_nodes(int64_t first, int64_t end) {
  int64_t nodes = 0;
  for (; first < end; first += node_tiles(first, end)) ++nodes;
  return nodes;
}

// States that may wait for their right sibling while a tree of so many tiles is merged from the left.
inline int64_t tree_levels(int64_t tiles) {
  int64_t levels = 1;
  for (; tiles > 1; tiles /= 2) ++levels;
  return levels;
}

DPPO_HOST_DEVICE RowReduction read_node(const float* fields) { return {fields[0], fields[1], fields[2], fields[3]}; }
DPPO_HOST_DEVICE void write_node(const RowReduction& state, float* fields) {
  fields[0] = state.max, fields[1] = state.rest, fields[2] = state.shifted, fields[3] = state.squares;
}

// The root over all shards' nodes of one row. `waiting(level)` is where the state of a level waits, a RowReduction& or
// what converts to one and can be assigned; `merge` is merge_in_tree.
template <typename Waiting, typename Merge>
DPPO_HOST_DEVICE RowReduction merge_nodes(const MergeNodesArguments& args, int64_t row, const Waiting& waiting,
                                          const Merge& merge) {
  int64_t depth = 0;
  for (int64_t shard = 0; shard < args.merge.shards; ++shard) {
    const float* fields = args.merge.partials + (shard * args.merge.n + row) * args.columns();
    const int64_t end = (shard + 1) * args.shard_tiles;
    for (int64_t first = shard * args.shard_tiles; first < end; fields += kNodeFields) {
      RowReduction state = read_node(fields);
      int64_t tiles = node_tiles(first, end), begin = first;
      first += tiles;
      // A right child finds its sibling on top, for all to its left is merged.
      for (; begin / tiles % 2 == 1; begin -= tiles, tiles *= 2) state = merge(waiting(--depth), state);
      waiting(depth++) = state;
    }
  }
  RowReduction root = waiting(--depth);
  while (depth > 0) root = merge(waiting(--depth), root);  // their right siblings are absent or part of the root
  return root;
}

}  // namespace megatron_dppo
