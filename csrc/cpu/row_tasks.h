// Spreads rows over threads: whole rows where there are enough of them, segments of rows where there are not.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../core/arguments.h"
#include "../core/split.h"

namespace megatron_dppo::cpu {

// A thread's share below this many elements costs more to hand out than to do.
constexpr int64_t kGrainElements = 16384;

// The rows inside (or outside) the mask, in order: threads share out work that is there, not rows that are skipped.
inline std::vector<int64_t> rows_of_mask(const RowMask& mask, int64_t n, bool inside) {
  std::vector<int64_t> rows;
  rows.reserve(inside || mask.inside != nullptr ? n : 0);
  for (int64_t i = 0; i < n; ++i)
    if (mask.skips(i) != inside) rows.push_back(i);
  return rows;
}

struct RowCut {
  int64_t segments;         // per row
  int64_t segment_columns;  // a multiple of 64, so that no two segments share a cache line of an aligned row

  RowCut(int64_t rows, int64_t columns) {
    segments = segments_per_row(rows, columns, 4 * at::get_num_threads(), kGrainElements);
    segment_columns = std::max<int64_t>((columns + segments - 1) / segments, 1);
    if (segments > 1) segment_columns = (segment_columns + 63) / 64 * 64;
  }
};

// Calls task(row, segment, first column, end column) for every segment of every row.
template <typename Task>
void for_each_segment(int64_t rows, int64_t columns, const RowCut& cut, const Task& task) {
  const int64_t elements = std::max<int64_t>(std::min(columns, cut.segment_columns), 1);
  at::parallel_for(0, rows * cut.segments, std::max<int64_t>(kGrainElements / elements, 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t segment = i % cut.segments;
                       const int64_t first = std::min(segment * cut.segment_columns, columns);
                       task(i / cut.segments, segment, first, std::min(first + cut.segment_columns, columns));
                     }
                   });
}

}  // namespace megatron_dppo::cpu
