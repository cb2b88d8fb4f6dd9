// Operators that reduce logits in an order that no layout changes (core/tile_tree.h).

#include "core/tile_tree.h"

#include <ATen/ops/empty.h>

#include "cpu/kernels.h"
#include "operators/checks.h"
#include "operators/cuda_device.h"
#include "operators/operators.h"
#include "operators/row_arguments.h"

namespace megatron_dppo {

Tensor tile_nodes(const Tensor& logits, const optional<Tensor>& rows, const optional<Tensor>& mask,
                  const Tensor& target, const optional<Tensor>& topk_ids, double temperature, int64_t first_column,
                  int64_t num_columns, int64_t nodes) {
  TileNodesArguments args{};
  args.row = check_row_arguments(logits, rows, mask, target, topk_ids, temperature, first_column, num_columns);
  TORCH_CHECK_VALUE(first_column >= 0 && first_column % kTileColumns == 0, "first_column must be a multiple of ",
                    kTileColumns, ", where a tile begins, not ", first_column);
  args.num_tiles = (logits.size(1) + kTileColumns - 1) / kTileColumns;
  const int64_t first_tile = first_column / kTileColumns, needed = count_nodes(first_tile, first_tile + args.num_tiles);
  TORCH_CHECK_VALUE(nodes >= needed, "tiles ", first_tile, " to ", first_tile + args.num_tiles, " are ", needed,
                    " nodes of the tree; nodes must not be ", nodes);
  args.nodes = nodes;
  Tensor partials =
      at::empty({args.row.selection.n, kNodeFields * nodes + 1 + args.row.topk}, logits.options().dtype(at::kFloat));
  args.row.partials = partials.mutable_data_ptr<float>();
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(logits)) {
    const CudaDevice device(logits);
    check_launch("tile_nodes", cuda::launch_tile_nodes(args, device.stream()));
    return partials;
  }
#endif
  cpu::tile_nodes(args);
  return partials;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_tile_nodes(const Tensor& partials,
                                                                            const optional<Tensor>& mask,
                                                                            double temperature, int64_t shard_tiles,
                                                                            int64_t nodes) {
  TORCH_CHECK_VALUE(shard_tiles >= 1 && nodes >= 1, "shard_tiles and nodes must be positive, not ", shard_tiles,
                    " and ", nodes);
  TORCH_CHECK_VALUE(partials.dim() == 3 && partials.size(0) >= 1 && partials.size(2) > kNodeFields * nodes,
                    "partials must have shape [shards, n, 4 nodes + 1 + K] with nodes = ", nodes, ", not ",
                    partials.sizes());
  TORCH_CHECK_VALUE(partials.scalar_type() == at::kFloat, "partials must be float32, not ", partials.scalar_type());
  TORCH_CHECK_VALUE(partials.is_contiguous(), "partials must be contiguous");
  for (int64_t shard = 0; shard < partials.size(0); ++shard) {
    const int64_t found = count_nodes(shard * shard_tiles, (shard + 1) * shard_tiles);
    TORCH_CHECK_VALUE(found <= nodes, "shard ", shard, " of ", shard_tiles, " tiles each has ", found,
                      " nodes of the tree; nodes must not be ", nodes);
  }
  const int64_t n = partials.size(1);
  RowOutputs outputs(n, partials.size(2) - kNodeFields * nodes - 1, partials);
  MergeNodesArguments args{};
  args.merge = outputs.arguments(partials, check_mask(mask, partials, n));
  args.shard_tiles = shard_tiles;
  args.nodes = nodes;
  args.temperature = check_temperature(temperature);
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(partials)) {
    const CudaDevice device(partials);
    const Tensor waiting =
        at::empty({cuda::merge_tile_nodes_workspace_bytes(args)}, partials.options().dtype(at::kByte));
    args.waiting = static_cast<float*>(waiting.mutable_data_ptr());
    check_launch("merge_tile_nodes", cuda::launch_merge_tile_nodes(args, device.stream()));
    return outputs.tensors();
  }
#endif
  cpu::merge_tile_nodes(args);
  return outputs.tensors();
}

}  // namespace megatron_dppo
