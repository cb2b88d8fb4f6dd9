// The sums of a list of pieces of weights, in one launch: see core/tile_hash.h.
//
// A block takes the words of a piece that lie in one tile; its threads hash four at a time where rows are whole aligned
// 16-byte vectors, else word by word, else from 16-bit halves. Each warp adds its sums to the tile's, with integer
// atomics: pieces can share a tile, and the result does not depend on who comes first.

#include "../core/tile_hash.h"

#include <algorithm>

#include "../core/tile_hash_arguments.h"
#include "launch.h"
#include "toolchain.cuh"

namespace megatron_dppo::cuda {
namespace {

constexpr int kThreads = 256;

// What a thread takes at a time: kUnits units are kWords words.
struct Vectors {
  using Unit = uint4;
  static constexpr int kUnits = 1, kWords = 4;
  static __device__ __forceinline__ void words_of(const uint4* units, uint32_t* words) {
    words[0] = units[0].x, words[1] = units[0].y, words[2] = units[0].z, words[3] = units[0].w;
  }
  static __device__ __forceinline__ uint4 zero() { return make_uint4(0, 0, 0, 0); }
};
struct Words {
  using Unit = uint32_t;
  static constexpr int kUnits = 1, kWords = 1;
  static __device__ __forceinline__ void words_of(const uint32_t* units, uint32_t* words) { words[0] = units[0]; }
  static __device__ __forceinline__ uint32_t zero() { return 0; }
};
struct Halves {
  using Unit = uint16_t;
  static constexpr int kUnits = 2, kWords = 1;
  static __device__ __forceinline__ void words_of(const uint16_t* units, uint32_t* words) {
    words[0] = units[0] | static_cast<uint32_t>(units[1]) << 16;
  }
  static __device__ __forceinline__ uint16_t zero() { return 0; }
};

// Finds units of a range in memory. Only the range's first row needs 64 bits: within a tile, 32 are enough to divide.
template <typename Unit>
struct Rows {
  const Unit* data;
  int64_t row_stride, first_row, present_rows, first_column, present_units;
  unsigned in_first_row;  // units of the range in its first row
  unsigned row_units;     // of the rows that follow

  __device__ __forceinline__ Rows(const TilePiece& piece, int64_t begin, int units)
      : data(static_cast<const Unit*>(piece.data)),
        row_stride(piece.row_stride),
        first_row(begin / piece.row_units),
        present_rows(piece.present_rows),
        first_column(begin % piece.row_units),
        present_units(piece.present_units),
        in_first_row(static_cast<unsigned>(min(piece.row_units - first_column, static_cast<int64_t>(units)))),
        row_units(static_cast<unsigned>(min(piece.row_units, static_cast<int64_t>(units)))) {}

  // Null where there is a 0 and no memory.
  __device__ __forceinline__ const Unit* find(unsigned unit) const {
    int64_t row = first_row, column = first_column + unit;
    if (unit >= in_first_row) {
      row += 1 + (unit - in_first_row) / row_units;
      column = (unit - in_first_row) % row_units;
    }
    return row < present_rows && column < present_units ? data + row * row_stride + column : nullptr;
  }
};

__device__ __forceinline__ void add_vector(WordSums& sums, const uint4& vector, WordPosition at) {
  uint32_t words[4];
  Vectors::words_of(&vector, words);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    sums.add(words[k], at);
    at.advance(1);
  }
}

// `vectors` that lie next to each other in memory. Arithmetic takes longer than reading, and all of a multiprocessor's
// threads fit at once: no need to read ahead.
__device__ __forceinline__ void add_contiguous(WordSums& sums, const uint4* data, int vectors, uint32_t position) {
  WordPosition at(position + 4 * threadIdx.x);
#pragma unroll 2
  for (int v = threadIdx.x; v < vectors; v += kThreads) {
    add_vector(sums, __ldg(data + v), at);
    at.advance(4 * kThreads);
  }
}

// Any range of a piece.
template <typename Group>
__device__ __forceinline__ void add_range(WordSums& sums, const TilePiece& piece, const TileRange& range) {
  constexpr int kUnits = Group::kUnits, kWords = Group::kWords;
  const int groups = range.count / kWords;
  const Rows<typename Group::Unit> rows(piece, range.begin / kWords * kUnits, groups * kUnits);
  WordPosition at(range.position + kWords * threadIdx.x);
#pragma unroll 1
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    typename Group::Unit units[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const auto* unit = rows.find(group * kUnits + i);
      units[i] = unit != nullptr ? __ldg(unit) : Group::zero();
    }
    uint32_t words[kWords];
    Group::words_of(units, words);
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      sums.add(words[k], at);
      at.advance(1);
    }
    at.advance(kWords * (kThreads - 1));
  }
}

// The vectors of a range if they lie next to each other in memory, else null.
__device__ __forceinline__ const uint4* contiguous(const TilePiece& piece, const TileRange& range) {
  if (piece.unit_bytes != sizeof(uint4)) return nullptr;
  const int64_t begin = range.begin / 4, row = begin / piece.row_units, column = begin % piece.row_units;
  if (row >= piece.present_rows || column + range.count / 4 > piece.present_units) return nullptr;
  return static_cast<const uint4*>(piece.data) + row * piece.row_stride + column;
}

__global__ void __launch_bounds__(kThreads) tile_hash_kernel(TileHashArguments args) {
  const int64_t task = blockIdx.x;
  const TilePiece piece = args.pieces[piece_of_task(args.pieces, args.num_pieces, task)];
  const TileRange range = tile_range(piece, task);
  WordSums sums;
  if (const uint4* vectors = contiguous(piece, range)) {
    add_contiguous(sums, vectors, range.count / 4, range.position);
  } else if (piece.unit_bytes == sizeof(uint4)) {
    add_range<Vectors>(sums, piece, range);
  } else if (piece.unit_bytes == sizeof(uint32_t)) {
    add_range<Words>(sums, piece, range);
  } else {
    add_range<Halves>(sums, piece, range);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.sum += __shfl_xor_sync(0xffffffffu, sums.sum, distance);
    sums.other_sum += __shfl_xor_sync(0xffffffffu, sums.other_sum, distance);
  }
  if (threadIdx.x % 32 != 0) return;
  auto* const totals = reinterpret_cast<unsigned*>(args.sums) + range.output_tile;
  atomicAdd(totals, sums.sum);
  atomicAdd(totals + args.total_tiles, sums.other_sum);
}

}  // namespace

cudaError_t launch_tile_hash(const TileHashArguments& args, cudaStream_t stream) {
  if (args.num_tasks == 0) return cudaSuccess;
  if (args.num_tasks > INT32_MAX) return cudaErrorInvalidValue;
  DPPO_LAUNCH(tile_hash_kernel, dim3(static_cast<unsigned>(args.num_tasks)), dim3(kThreads), stream, args);
  return DPPO_LAUNCH_STATUS();
}

}  // namespace megatron_dppo::cuda
