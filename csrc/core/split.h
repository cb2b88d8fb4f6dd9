// How a [rows, columns] job is cut when there are too few rows to occupy the machine.
#pragma once

#include <cstdint>

namespace megatron_dppo {

// Segments per row so that rows * segments reaches `wanted_tasks`, each of at least `min_columns` columns.
inline int64_t segments_per_row(int64_t rows, int64_t columns, int64_t wanted_tasks, int64_t min_columns) {
  if (rows <= 0 || rows >= wanted_tasks) return 1;
  const int64_t wanted = (wanted_tasks + rows - 1) / rows;
  const int64_t possible = columns / min_columns;
  return wanted < possible ? wanted : (possible > 1 ? possible : 1);
}

}  // namespace megatron_dppo
