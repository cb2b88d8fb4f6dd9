// The operator that hashes pieces of weights (core/tile_hash.h).

#include "operators/operators.h"

#include <ATen/ops/empty.h>

#include "core/tile_hash_arguments.h"
#include "cpu/kernels.h"
#include "operators/checks.h"
#include "operators/cuda_device.h"

namespace megatron_dppo {

namespace {

constexpr int64_t kMaxParameterWords = int64_t{1} << 60;  // no sum or product of sizes overflows

TileMatrix check_piece(int64_t i, const Tensor& source, const Tensor& sums, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(source.device() == sums.device(), "piece ", i, " is on ", source.device(), ", sums on ",
                    sums.device());
  TORCH_CHECK_VALUE(source.dim() == 2 && (source.size(1) <= 1 || source.stride(1) == 1), "piece ", i,
                    " must be a matrix with contiguous columns, not of shape ", source.sizes(), " and strides ",
                    source.strides());
  const auto bytes = static_cast<int64_t>(source.element_size());
  TORCH_CHECK_VALUE(bytes == 2 || bytes == 4 || bytes == 8, "piece ", i, " must have elements of 2, 4 or 8 bytes, not ",
                    source.scalar_type());
  TORCH_CHECK_VALUE(rows >= source.size(0) && columns >= source.size(1), "piece ", i, " of shape ", source.sizes(),
                    " is larger than the ", rows, " x ", columns, " that it is part of");
  TORCH_CHECK_VALUE(columns == 0 || rows <= kMaxParameterWords / columns, "piece ", i, " has ", rows, " x ", columns,
                    " elements, which is too many");
  TORCH_CHECK_VALUE(rows * columns * bytes % 4 == 0, "piece ", i, " has ", rows, " x ", columns, " elements of ", bytes,
                    " bytes, which are not whole words of 4 bytes");
  return {source.const_data_ptr(), bytes, source.stride(0), source.size(0), source.size(1), rows, columns};
}

}  // namespace

void tile_hash(const Tensor& sums, at::TensorList sources, at::IntArrayRef rows, at::IntArrayRef columns,
               at::IntArrayRef first_words, at::IntArrayRef first_tiles) {
  TORCH_CHECK_VALUE(sums.dim() == 2, "sums must have shape [2, tiles], not ", sums.sizes());
  const int64_t total_tiles = sums.size(1);
  check_like("sums", sums, sums, at::kInt, {2, total_tiles});
  const auto n = static_cast<int64_t>(sources.size());
  for (const at::IntArrayRef list : {rows, columns, first_words, first_tiles})
    TORCH_CHECK_VALUE(static_cast<int64_t>(list.size()) == n, "rows, columns, first_words and first_tiles must have ",
                      n, " values, one for each source, not ", list.size());
  // Pinned: the copy to a GPU then waits for nothing.
  const auto options = at::TensorOptions().dtype(at::kLong).pinned_memory(sums.is_cuda());
  Tensor descriptions = at::empty({n, sizeof(TilePiece) / sizeof(int64_t)}, options);
  auto* const pieces = reinterpret_cast<TilePiece*>(descriptions.mutable_data_ptr<int64_t>());
  int64_t num_tasks = 0;
  for (int64_t i = 0; i < n; ++i) {
    const TileMatrix matrix = check_piece(i, sources[i], sums, rows[i], columns[i]);
    TORCH_CHECK_VALUE(first_words[i] >= 0 && first_words[i] <= kMaxParameterWords, "piece ", i, " begins at word ",
                      first_words[i]);
    pieces[i] = tile_piece(matrix, first_words[i], first_tiles[i], num_tasks);
    const int64_t tiles = pieces[i].num_tiles();
    TORCH_CHECK_VALUE(first_tiles[i] >= 0 && first_tiles[i] <= total_tiles - tiles, "piece ", i, " has ", tiles,
                      " tiles, from number ", first_tiles[i], " on; sums have ", total_tiles);
    num_tasks += tiles;
  }
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(sums)) {
    const CudaDevice device(sums);
    const Tensor on_device = descriptions.to(sums.device(), /*non_blocking=*/true);
    const auto* there = reinterpret_cast<const TilePiece*>(on_device.const_data_ptr<int64_t>());
    const TileHashArguments args{there, n, num_tasks, sums.mutable_data_ptr<int32_t>(), total_tiles};
    check_launch("tile_hash", cuda::launch_tile_hash(args, device.stream()));
    return;
  }
#endif
  cpu::tile_hash({pieces, n, num_tasks, sums.mutable_data_ptr<int32_t>(), total_tiles});
}

}  // namespace megatron_dppo
