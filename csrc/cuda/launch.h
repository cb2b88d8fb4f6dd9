// The CUDA kernels' host side. No torch here, and of CUDA only the C interface: a C++ compiler can include it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../core/arguments.h"
#include "../core/policy_gradient_arguments.h"
#include "../core/tile_hash_arguments.h"
#include "../core/token_checks_arguments.h"
#include "../core/token_objective_arguments.h"

namespace megatron_dppo::cuda {

// Of the current device.
int multiprocessor_count();
int64_t l2_cache_bytes();

// How a forward is cut. With more than one segment per row it needs scratch memory, which the caller allocates.
struct PartialsPlan {
  int64_t segments;
  int64_t workspace_bytes;
};
PartialsPlan plan_row_partials(const PartialsArguments& args, int multiprocessors);

// All launches are asynchronous; what they point to must live until the stream has passed them. `workspace` must be
// aligned to 16 bytes.
cudaError_t launch_row_partials(const PartialsArguments& args, const PartialsPlan& plan, void* workspace,
                                cudaStream_t stream);
cudaError_t launch_merge_partials(const MergeArguments& args, cudaStream_t stream);
cudaError_t launch_tile_nodes(const TileNodesArguments& args, cudaStream_t stream);
int64_t merge_tile_nodes_workspace_bytes(const MergeNodesArguments& args);
cudaError_t launch_merge_tile_nodes(const MergeNodesArguments& args, cudaStream_t stream);
cudaError_t launch_policy_backward(const BackwardArguments& args, int multiprocessors, cudaStream_t stream);

// How many parts of every row's sum the kernel leaves: sums is [n, segments].
int64_t divergence_segments(const DivergenceArguments& args, int multiprocessors);
cudaError_t launch_shard_divergence(const DivergenceArguments& args, int64_t segments, cudaStream_t stream);

int64_t token_objective_workspace_bytes(int64_t n, int multiprocessors);
cudaError_t launch_token_objective(const TokenObjectiveArguments& args, int multiprocessors, void* workspace,
                                   cudaStream_t stream);

// How many rows are under way at a time: as many as an L2 cache of that size keeps, but one for every multiprocessor at
// least and a few at most.
int64_t policy_gradient_blocks(const PolicyGradientArguments& args, int multiprocessors, int64_t cache_bytes);
cudaError_t launch_policy_gradient(const PolicyGradientArguments& args, int64_t blocks, cudaStream_t stream);

// `workspace`: kTokenChecksWorkspaceBytes.
cudaError_t launch_check_tokens(const TokenChecksArguments& args, int multiprocessors, void* workspace,
                                cudaStream_t stream);

cudaError_t launch_tile_hash(const TileHashArguments& args, cudaStream_t stream);

}  // namespace megatron_dppo::cuda
