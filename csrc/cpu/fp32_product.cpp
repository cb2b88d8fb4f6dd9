// The product of 16-bit matrices with an fp32 result, of any size and either way round.
//
// oneDNN multiplies blocks; what is here cuts the matrices, lays their elements out as it asks for and shares blocks
// out to threads. A panel of b stays in the cache while all rows of a pass by; sums are read and written once for each
// kPanelDepth of the products' length.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../core/fp32_product_arguments.h"
#include "block_product.h"
#include "kernels.h"

namespace megatron_dppo::cpu {
namespace {

constexpr int64_t kRows = 64, kColumns = 64;  // of a block of sums
constexpr int64_t kDepth = 256;               // of a block product: both operands stay in the first-level cache, nearly
constexpr int64_t kPanelDepth = 1024, kPanelColumns = 2048;
constexpr int64_t kTasksPerThread = 4;  // so that an unlucky thread has a small part of the work left

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t even(int64_t depth) { return depth + depth % 2; }

// Depths [first, first + depth) of a panel of b.
struct Panel {
  int64_t first_depth, depth, first_column, columns;

  int64_t column_blocks() const { return ceil_div(columns, kColumns); }
  int64_t block_elements() const { return even(depth) * kColumns; }
};

// Block by block [even(depth) / 2, kColumns, 2], zeros beyond the depth; columns beyond the panel's are not asked for.
void pack_columns(const Fp32ProductArguments& args, const Panel& panel, int64_t block, uint16_t* packed) {
  const int64_t first = panel.first_column + block * kColumns;
  const int64_t columns = std::min(kColumns, panel.first_column + panel.columns - first);
  if (args.b.column_stride == 1) {
    for (int64_t depth = 0; depth < panel.depth; depth += 2) {
      const uint16_t* const even_row = args.b.at(panel.first_depth + depth, first);
      uint16_t* const pairs = packed + depth * kColumns;
      if (depth + 1 < panel.depth) {
        const uint16_t* const odd_row = args.b.at(panel.first_depth + depth + 1, first);
        for (int64_t j = 0; j < columns; ++j) pairs[2 * j] = even_row[j], pairs[2 * j + 1] = odd_row[j];
      } else {
        for (int64_t j = 0; j < columns; ++j) pairs[2 * j] = even_row[j], pairs[2 * j + 1] = 0;
      }
    }
    return;
  }
  constexpr int64_t kStep = 32;  // depths: a cache line of a column
  const int64_t whole_pairs = panel.depth / 2 * 2;
  for (int64_t begin = 0; begin < whole_pairs; begin += kStep) {
    const int64_t end = std::min(begin + kStep, whole_pairs);
    for (int64_t j = 0; j < columns; ++j) {
      const uint16_t* const column = args.b.at(panel.first_depth, first + j);
      for (int64_t depth = begin; depth < end; depth += 2)
        std::memcpy(packed + depth * kColumns + 2 * j, column + depth, 2 * sizeof(uint16_t));
    }
  }
  for (int64_t j = 0; whole_pairs < panel.depth && j < columns; ++j) {
    packed[whole_pairs * kColumns + 2 * j] = *args.b.at(panel.first_depth + whole_pairs, first + j);
    packed[whole_pairs * kColumns + 2 * j + 1] = 0;
  }
}

// [rows, even(depth)], a zero beyond the depth.
void pack_rows(const Fp32ProductArguments& args, const Panel& panel, int64_t first, int64_t rows, uint16_t* packed) {
  const int64_t width = even(panel.depth);
  if (args.a.column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i)
      std::copy_n(args.a.at(first + i, panel.first_depth), panel.depth, packed + i * width);
  } else {
    constexpr int64_t kStep = 32;  // depths: as many lines of a's memory are in use at a time
    for (int64_t begin = 0; begin < panel.depth; begin += kStep) {
      const int64_t end = std::min(begin + kStep, panel.depth);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t depth = begin; depth < end; ++depth)
          packed[i * width + depth] = *args.a.at(first + i, panel.first_depth + depth);
    }
  }
  if (width != panel.depth)
    for (int64_t i = 0; i < rows; ++i) packed[i * width + panel.depth] = 0;
}

void multiply_panel(const Fp32ProductArguments& args, const Panel& panel, uint16_t* packed_b) {
  const int64_t column_blocks = panel.column_blocks();
  at::parallel_for(0, column_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      pack_columns(args, panel, block, packed_b + block * panel.block_elements());
  });
  const bool as_it_is = args.a.column_stride == 1 && panel.depth % 2 == 0;
  const bool accumulate = args.accumulate || panel.first_depth > 0;
  const int64_t row_blocks = ceil_div(args.m, kRows);
  // Few rows: threads share out the columns too.
  const int64_t groups =
      std::clamp<int64_t>(ceil_div(kTasksPerThread * at::get_num_threads(), row_blocks), 1, column_blocks);
  const int64_t group_blocks = ceil_div(column_blocks, groups);
  at::parallel_for(0, row_blocks * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> packed_a(as_it_is ? 0 : kRows * even(panel.depth));
    int64_t packed_block = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / groups * kRows, rows = std::min(kRows, args.m - first_row);
      const uint16_t* a = as_it_is ? args.a.at(first_row, panel.first_depth) : packed_a.data();
      const int64_t a_stride = as_it_is ? args.a.row_stride : even(panel.depth);
      if (!as_it_is && packed_block != task / groups) {
        packed_block = task / groups;
        pack_rows(args, panel, first_row, rows, packed_a.data());
      }
      const int64_t first_block = task % groups * group_blocks;
      for (int64_t block = first_block; block < std::min(first_block + group_blocks, column_blocks); ++block) {
        const int64_t column = panel.first_column + block * kColumns;
        const int64_t columns = std::min(kColumns, panel.first_column + panel.columns - column);
        const uint16_t* const b = packed_b + block * panel.block_elements();
        float* const sums = args.sums + first_row * args.sums_row_stride + column;
        for (int64_t depth = 0; depth < even(panel.depth); depth += kDepth)
          block_product(args.dtype, rows, columns, std::min(kDepth, even(panel.depth) - depth), a + depth, a_stride,
                        b + depth * kColumns, kColumns, sums, args.sums_row_stride, accumulate || depth > 0);
      }
    }
    end_block_products();
  });
}

}  // namespace

bool has_fp32_product(Dtype dtype) {
  static const bool bfloat16 = has_block_product(Dtype::kBFloat16), float16 = has_block_product(Dtype::kFloat16);
  return (dtype == Dtype::kBFloat16 && bfloat16) || (dtype == Dtype::kFloat16 && float16);
}

void fp32_product(const Fp32ProductArguments& args) {
  if (args.m == 0 || args.n == 0) return;
  if (args.k == 0) {
    for (int64_t i = 0; i < args.m && !args.accumulate; ++i)
      std::fill_n(args.sums + i * args.sums_row_stride, args.n, 0.0f);
    return;
  }
  const int64_t most_depth = std::min(kPanelDepth, even(args.k));
  const int64_t most_columns = ceil_div(std::min(kPanelColumns, args.n), kColumns) * kColumns;
  // The columns that pad the last block belong to no sum, but oneDNN may read them.
  std::vector<uint16_t> packed_b(most_depth * most_columns);
  for (int64_t column = 0; column < args.n; column += kPanelColumns)
    for (int64_t depth = 0; depth < args.k; depth += kPanelDepth)
      multiply_panel(args,
                     {depth, std::min(kPanelDepth, args.k - depth), column, std::min(kPanelColumns, args.n - column)},
                     packed_b.data());
}

}  // namespace megatron_dppo::cpu
