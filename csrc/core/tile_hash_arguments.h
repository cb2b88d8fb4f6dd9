// Arguments of the kernel that hashes weights as SGLang's servers do, the same for CPU and CUDA: see tile_hash.h.
#pragma once

#include <cstdint>

#include "platform.h"

namespace megatron_dppo {

constexpr int kTileWords = 8192;  // of 32 bits; sums are kept for each tile

// A matrix of a parameter, flattened row by row into it from word `first_word` on. Memory holds its first rows and
// columns; what lies beyond is 0. Only 64-bit fields: the structures travel to a GPU as a tensor.
//
// A unit is the most bytes (16, 4 or 2) of which all rows, their distance in memory and the place in the parameter are
// multiples. A matrix without gaps in memory is kept as a single row.
struct TilePiece {
  const void* data;  // of the matrix's device
  int64_t unit_bytes;
  int64_t row_stride;    // units from one row in memory to the next
  int64_t present_rows;  // in memory
  int64_t present_units;
  int64_t row_units;  // of a row in the parameter
  int64_t num_words;
  int64_t first_word;
  int64_t first_output_tile;  // where the sums of the tile of `first_word` go
  int64_t first_task;         // tiles of the pieces before this one

  DPPO_HOST_DEVICE int64_t first_tile() const { return first_word / kTileWords; }
  // Tiles that hold some of its words.
  DPPO_HOST_DEVICE int64_t num_tiles() const {
    return num_words == 0 ? 0 : (first_word + num_words - 1) / kTileWords - first_tile() + 1;
  }
};
static_assert(sizeof(TilePiece) == 10 * sizeof(int64_t), "a row of an int64 tensor");

// The words of a piece that lie in one tile.
struct TileRange {
  int64_t begin;  // words from the piece's first one
  int count;
  uint32_t position;  // of the first of them in the parameter, modulo 2^32
  int64_t output_tile;
};

DPPO_HOST_DEVICE TileRange tile_range(const TilePiece& piece, int64_t task) {
  const int64_t tile = piece.first_tile() + (task - piece.first_task);
  const int64_t end_of_piece = piece.first_word + piece.num_words;
  const int64_t first = tile * kTileWords > piece.first_word ? tile * kTileWords : piece.first_word;
  const int64_t end = (tile + 1) * kTileWords < end_of_piece ? (tile + 1) * kTileWords : end_of_piece;
  return {first - piece.first_word, static_cast<int>(end - first), static_cast<uint32_t>(first),
          piece.first_output_tile + (task - piece.first_task)};
}

struct TileHashArguments {
  const TilePiece* pieces;  // [num_pieces], in memory of the kernel's device
  int64_t num_pieces;
  int64_t num_tasks;  // tiles of all pieces
  int32_t* sums;      // [2, total_tiles]  OUT: added to, modulo 2^32
  int64_t total_tiles;
};

// The last piece that begins at or before a task: pieces without words begin where the next one does.
DPPO_HOST_DEVICE int64_t piece_of_task(const TilePiece* pieces, int64_t num_pieces, int64_t task) {
  int64_t piece = 0, end = num_pieces;
  while (end - piece > 1) {
    const int64_t middle = piece + (end - piece) / 2;
    if (pieces[middle].first_task <= task) {
      piece = middle;
    } else {
      end = middle;
    }
  }
  return piece;
}

// A matrix of elements, its columns next to each other in memory; columns and rows beyond the present ones are 0.
struct TileMatrix {
  const void* data;
  int64_t element_bytes;  // 2, 4 or 8
  int64_t row_stride;     // elements
  int64_t present_rows, present_columns;
  int64_t rows, columns;
};

// `rows * columns` elements must be whole words.
inline TilePiece tile_piece(TileMatrix matrix, int64_t first_word, int64_t first_output_tile, int64_t first_task) {
  const int64_t num_words = matrix.rows * matrix.columns * matrix.element_bytes / 4;
  if (matrix.present_rows == 0 || matrix.present_columns == 0) matrix.present_rows = matrix.present_columns = 0;
  const bool has_gaps = matrix.present_columns != matrix.columns || matrix.row_stride != matrix.columns;
  if (matrix.present_rows <= 1 || !has_gaps) {
    if (matrix.present_rows > 1) matrix.present_columns *= matrix.present_rows;
    matrix.columns *= matrix.rows;
    matrix.rows = 1;
    matrix.present_rows = matrix.present_rows > 0 ? 1 : 0;
    matrix.row_stride = 0;
  }
  const int64_t row_bytes = matrix.columns * matrix.element_bytes;
  const int64_t present_bytes = matrix.present_columns * matrix.element_bytes;
  const int64_t stride_bytes = matrix.row_stride * matrix.element_bytes;
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(matrix.data));
  const int64_t together = row_bytes | present_bytes | stride_bytes | address | first_word * 4;
  const int64_t unit = together % 16 == 0 ? 16 : (together % 4 == 0 ? 4 : 2);
  return {matrix.data,      unit,      stride_bytes / unit, matrix.present_rows, present_bytes / unit,
          row_bytes / unit, num_words, first_word,          first_output_tile,   first_task};
}

}  // namespace megatron_dppo
