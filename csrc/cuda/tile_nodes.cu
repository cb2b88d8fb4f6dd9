// Forward in an order that no layout changes (core/tile_tree.h): a shard's tiles become the nodes of the tree that it
// holds, and the nodes of all shards the outputs.
//
// A block makes one node of one row. Each of its warps takes 32 tiles at a time: together they reduce one after the
// other, each thread 4 neighbouring columns, and thread t keeps the state of tile t; shuffles then merge the 32, and
// the block what its warps left in shared memory. Absent tiles, in a node of fewer than 32, are empty.

#include "../core/row_outputs.h"
#include "../core/tile_tree.h"
#include "launch.h"
#include "vector_access.cuh"

namespace megatron_dppo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroup = 32;                   // tiles that a warp merges
constexpr int kColumns = kTileColumns / 32;  // per thread
constexpr int kMostGroups = 1024;            // in a node: 4,194,304 columns
constexpr int kMergeThreads = 128;

static_assert(kColumns == 4);

// Columns [0, 4) of this thread's part of a tile, of which the first `n` are there; the others are -inf. What is loaded
// at once makes no difference to what follows.
__device__ __forceinline__ void read_columns(const float* x, int64_t n, float (&values)[kColumns]) {
  if (n >= kColumns && reinterpret_cast<uintptr_t>(x) % sizeof(float4) == 0) {
    Vector<float>::unpack(__ldg(reinterpret_cast<const float4*>(x)), values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) values[i] = i < n ? x[i] : -INFINITY;
}
template <typename T>
__device__ __forceinline__ void read_columns(const T* x, int64_t n, float (&values)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) values[i] = i < n ? to_float(x[i]) : -INFINITY;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = rounded_sum(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

// The state of a tile, in all threads of the warp.
__device__ __forceinline__ RowReduction reduce_tile(const float (&x)[kColumns], float exp2_scale) {
  float max = nan_max(nan_max(x[0], x[1]), nan_max(x[2], x[3]));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) max = nan_max(max, __shfl_xor_sync(0xffffffffu, max, distance));
  max = rounded_sum(max, 0.f);  // of 0 and -0, 0
  const float reference = finite_reference(max);
  float rest = 0.f, shifted = 0.f, squares = 0.f, at_max = 0.f;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const float d = shift_by_max(x[i], reference);
    const bool is_max = d >= 0.f;
    const float e = is_max ? 0.f : exp2f(rounded_product(d, exp2_scale));
    at_max += is_max ? 1.f : 0.f;
    rest = rounded_sum(rest, e);
    shifted = rounded_sum(shifted, rounded_product(d, e));
    squares = rounded_sum(squares, rounded_product(e, e));
  }
  // One occurrence of the maximum stays left out. A tile of nothing but -inf has none.
  const float others = nan_max(warp_sum(at_max) - 1.f, 0.f);
  return {max, rounded_sum(warp_sum(rest), others), warp_sum(shifted), rounded_sum(warp_sum(squares), others)};
}

// The state of 32 tiles, one of each thread's, in thread 0.
__device__ __forceinline__ RowReduction merge_group(RowReduction state, float exp2_scale) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    RowReduction right;
    right.max = __shfl_xor_sync(0xffffffffu, state.max, distance);
    right.rest = __shfl_xor_sync(0xffffffffu, state.rest, distance);
    right.shifted = __shfl_xor_sync(0xffffffffu, state.shifted, distance);
    right.squares = __shfl_xor_sync(0xffffffffu, state.squares, distance);
    state = merge_in_tree(state, right, exp2_scale);  // of use where bit `distance` of the thread's number is 0
  }
  return state;
}

struct Node {
  int first_tile;  // of the shard
  int tiles;       // 0: this shard has no such node
};

__device__ __forceinline__ Node find_node(const TileNodesArguments& args, int number) {
  const int64_t first = args.row.logits.first_column / kTileColumns, end = first + args.num_tiles;
  int64_t tile = first;
  for (int i = 0; i < number && tile < end; ++i) tile += node_tiles(tile, end);
  return {static_cast<int>(tile - first), tile < end ? static_cast<int>(node_tiles(tile, end)) : 0};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) tile_nodes_kernel(TileNodesArguments args) {
  DPPO_SHARED(RowReduction, states, kMostGroups);
  const int64_t i = blockIdx.x / args.nodes;
  const int number = static_cast<int>(blockIdx.x % args.nodes);
  const PartialsArguments& row = args.row;
  const int64_t gathered = kNodeFields * args.nodes, columns = gathered + 1 + row.topk;
  float* const out = row.partials + i * columns;
  if (row.selection.skips(i)) {
    for (int64_t k = threadIdx.x; number == 0 && k < columns; k += kThreads) out[k] = 0.f;
    return;
  }
  const T* x = static_cast<const T*>(row.logits.data) + row.selection.row(i) * row.logits.row_stride;
  const float exp2_scale = kLog2E / row.temperature;
  const Node node = find_node(args, number);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int groups = (node.tiles + kGroup - 1) / kGroup;
#pragma unroll 1
  for (int group = warp; group < groups; group += kWarps) {
    RowReduction state;
    const int tiles = min(kGroup, node.tiles - group * kGroup);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int64_t column = (node.first_tile + group * kGroup + tile) * kTileColumns + lane * kColumns;
      float values[kColumns];
      read_columns(x + column, row.logits.num_columns - column, values);
      const RowReduction found = reduce_tile(values, exp2_scale);
      if (lane == tile) state = found;
    }
    state = merge_group(state, exp2_scale);
    if (lane == 0) states[group] = state;
  }
  // In place: what one level writes is read by nobody before the next.
#pragma unroll 1
  for (int count = groups; count > 1; count /= 2) {
#pragma unroll 1
    for (int begin = 0; begin < count / 2; begin += kThreads) {
      const int parent = begin + threadIdx.x;
      __syncthreads();
      RowReduction state;
      if (parent < count / 2) state = merge_in_tree(states[2 * parent], states[2 * parent + 1], exp2_scale);
      __syncthreads();
      if (parent < count / 2) states[parent] = state;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) write_node(groups > 0 ? states[0] : RowReduction(), out + kNodeFields * number);
  for (int64_t k = threadIdx.x; number == 0 && k <= row.topk; k += kThreads) {
    const int64_t id = k == 0 ? row.target[i] : row.topk_ids[i * row.topk + k - 1];
    const int64_t column = id - row.logits.first_column;
    const bool is_here = column >= 0 && column < row.logits.num_columns;
    out[gathered + k] = is_here ? to_float(x[column]) / row.temperature : 0.f;
  }
}

// A state in scratch memory.
struct WaitingState {
  float4* place;

  __device__ __forceinline__ operator RowReduction() const { return {place->x, place->y, place->z, place->w}; }
  __device__ __forceinline__ void operator=(const RowReduction& state) const {
    *place = make_float4(state.max, state.rest, state.shifted, state.squares);
  }
};

// One thread a row.
__global__ void __launch_bounds__(kMergeThreads) merge_tile_nodes_kernel(MergeNodesArguments args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (row >= args.merge.n) return;
  if (args.merge.mask.skips(row)) return write_no_outputs(args.merge, row);
  const float exp2_scale = kLog2E / args.temperature;
  float4* const waiting = reinterpret_cast<float4*>(args.waiting);
  const RowReduction root = merge_nodes(
      args, row, [&](int64_t level) { return WaitingState{waiting + level * args.merge.n + row}; },
      [&](const RowReduction& left, const RowReduction& right) { return merge_in_tree(left, right, exp2_scale); });
  finish_row_of_nodes(args, row, root);
}

}  // namespace

cudaError_t launch_tile_nodes(const TileNodesArguments& args, cudaStream_t stream) {
  const int64_t blocks = args.row.selection.n * args.nodes;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || args.num_tiles > kMostGroups * kGroup) return cudaErrorInvalidValue;
  switch_dtype(args.row.logits.dtype, CudaElements(), [&](auto tag) {
    DPPO_LAUNCH(tile_nodes_kernel<typename decltype(tag)::Type>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                stream, args);
  });
  return DPPO_LAUNCH_STATUS();
}

int64_t merge_tile_nodes_workspace_bytes(const MergeNodesArguments& args) {
  return tree_levels(args.merge.shards * args.shard_tiles) * args.merge.n * static_cast<int64_t>(sizeof(float4));
}

cudaError_t launch_merge_tile_nodes(const MergeNodesArguments& args, cudaStream_t stream) {
  if (args.merge.n == 0) return cudaSuccess;
  const int64_t blocks = (args.merge.n + kMergeThreads - 1) / kMergeThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  DPPO_LAUNCH(merge_tile_nodes_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMergeThreads), stream, args);
  return DPPO_LAUNCH_STATUS();
}

}  // namespace megatron_dppo::cuda
