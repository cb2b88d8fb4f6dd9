// The sums of a list of pieces of weights, a tile at a time: see core/tile_hash.h.
//
// Words that lie next to each other in memory are hashed where they are. Rows with gaps between them, and zeros that
// are in no memory, are first brought together in a buffer of a tile: the inner loop is long, whatever the rows'
// length.

#include "../core/tile_hash.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>

#include "../core/tile_hash_arguments.h"
#include "kernels.h"
#include "tile_words.h"

namespace megatron_dppo::cpu {
namespace {

constexpr int64_t kGrainTiles = 2;

struct TileBuffer {
  alignas(64) std::byte bytes[4 * kTileWords];
};

// Where the range lies, in memory of the piece or brought together in `buffer`.
const std::byte* bytes_of(const TilePiece& piece, const TileRange& range, TileBuffer& buffer) {
  const int64_t row_bytes = piece.row_units * piece.unit_bytes, present_bytes = piece.present_units * piece.unit_bytes;
  const int64_t stride_bytes = piece.row_stride * piece.unit_bytes, count = 4 * int64_t{range.count};
  const auto* data = static_cast<const std::byte*>(piece.data);
  int64_t row = 4 * range.begin / row_bytes, column = 4 * range.begin % row_bytes;
  if (row < piece.present_rows && column + count <= present_bytes) return data + row * stride_bytes + column;
  for (int64_t done = 0; done < count; ++row, column = 0) {
    const int64_t wanted = std::min(row_bytes - column, count - done);
    const int64_t present = row < piece.present_rows ? std::clamp<int64_t>(present_bytes - column, 0, wanted) : 0;
    if (present > 0) std::memcpy(buffer.bytes + done, data + row * stride_bytes + column, present);
    std::memset(buffer.bytes + done + present, 0, wanted - present);
    done += wanted;
  }
  return buffer.bytes;
}

void add(int32_t& total, uint32_t sum) {
  std::atomic_ref<int32_t>(total).fetch_add(static_cast<int32_t>(sum), std::memory_order_relaxed);
}

}  // namespace

void tile_hash(const TileHashArguments& args) {
  at::parallel_for(0, args.num_tasks, kGrainTiles, [&](int64_t begin, int64_t end) {
    TileBuffer buffer;
    int64_t i = piece_of_task(args.pieces, args.num_pieces, begin);
    for (int64_t task = begin; task < end; ++task) {
      while (i + 1 < args.num_pieces && args.pieces[i + 1].first_task <= task) ++i;
      const TileRange range = tile_range(args.pieces[i], task);
      const WordSums sums = hash_words(bytes_of(args.pieces[i], range, buffer), range.count, range.position);
      add(args.sums[range.output_tile], sums.sum);
      add(args.sums[args.total_tiles + range.output_tile], sums.other_sum);
    }
  });
}

}  // namespace megatron_dppo::cpu
