// C interface of the emulated launchers, for ctypes: the structures of core/arguments.h go through unchanged.
// Each function returns nullptr, or what went wrong (valid until the next call).

#include <cstdlib>
#include <exception>
#include <string>

#include "cuda/launch.h"

namespace {

using namespace megatron_dppo;

std::string last_error;

template <typename Launch>
const char* guarded(const Launch& launch) {
  try {
    const cudaError_t error = launch();
    if (error == cudaSuccess) return nullptr;
    last_error = "launch error " + std::to_string(static_cast<int>(error));
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return last_error.c_str();
}

}  // namespace

#define DPPO_EXPORT extern "C" __attribute__((visibility("default")))

DPPO_EXPORT const char* emulated_row_partials(const PartialsArguments* args, int multiprocessors) {
  return guarded([&] {
    const cuda::PartialsPlan plan = cuda::plan_row_partials(*args, multiprocessors);
    void* workspace = plan.workspace_bytes > 0 ? std::malloc(plan.workspace_bytes) : nullptr;
    const cudaError_t error = cuda::launch_row_partials(*args, plan, workspace, nullptr);
    std::free(workspace);
    return error;
  });
}
DPPO_EXPORT const char* emulated_merge_partials(const MergeArguments* args) {
  return guarded([&] { return cuda::launch_merge_partials(*args, nullptr); });
}
DPPO_EXPORT const char* emulated_tile_nodes(const TileNodesArguments* args) {
  return guarded([&] { return cuda::launch_tile_nodes(*args, nullptr); });
}
DPPO_EXPORT const char* emulated_merge_tile_nodes(MergeNodesArguments* args) {
  return guarded([&] {
    args->waiting = static_cast<float*>(std::malloc(cuda::merge_tile_nodes_workspace_bytes(*args)));
    const cudaError_t error = cuda::launch_merge_tile_nodes(*args, nullptr);
    std::free(args->waiting);
    return error;
  });
}
DPPO_EXPORT const char* emulated_policy_backward(const BackwardArguments* args, int multiprocessors) {
  return guarded([&] { return cuda::launch_policy_backward(*args, multiprocessors, nullptr); });
}
DPPO_EXPORT const char* emulated_shard_divergence(const DivergenceArguments* args, int multiprocessors) {
  // The caller sizes `sums` by emulated_divergence_segments.
  return guarded(
      [&] { return cuda::launch_shard_divergence(*args, cuda::divergence_segments(*args, multiprocessors), nullptr); });
}
DPPO_EXPORT int64_t emulated_divergence_segments(const DivergenceArguments* args, int multiprocessors) {
  return cuda::divergence_segments(*args, multiprocessors);
}
DPPO_EXPORT const char* emulated_token_objective(const TokenObjectiveArguments* args, int multiprocessors) {
  return guarded([&] {
    void* workspace = std::malloc(cuda::token_objective_workspace_bytes(args->n, multiprocessors));
    const cudaError_t error = cuda::launch_token_objective(*args, multiprocessors, workspace, nullptr);
    std::free(workspace);
    return error;
  });
}
DPPO_EXPORT const char* emulated_policy_gradient(const PolicyGradientArguments* args, int blocks) {
  return guarded([&] { return cuda::launch_policy_gradient(*args, blocks, nullptr); });
}
DPPO_EXPORT int64_t emulated_policy_gradient_blocks(const PolicyGradientArguments* args, int multiprocessors,
                                                    int64_t cache_bytes) {
  return cuda::policy_gradient_blocks(*args, multiprocessors, cache_bytes);
}
DPPO_EXPORT const char* emulated_check_tokens(const TokenChecksArguments* args, int multiprocessors) {
  return guarded([&] {
    void* workspace = std::malloc(kTokenChecksWorkspaceBytes);
    const cudaError_t error = cuda::launch_check_tokens(*args, multiprocessors, workspace, nullptr);
    std::free(workspace);
    return error;
  });
}
DPPO_EXPORT const char* emulated_tile_hash(const TileHashArguments* args) {
  return guarded([&] { return cuda::launch_tile_hash(*args, nullptr); });
}
// How the launcher's caller sees a piece (csrc/operators/tile_hash.cpp).
DPPO_EXPORT void describe_piece(TilePiece* piece, const TileMatrix* matrix, int64_t first_word, int64_t first_tile,
                                int64_t first_task) {
  *piece = tile_piece(*matrix, first_word, first_tile, first_task);
}
