// The CPU kernels behind the C interface of the emulated CUDA kernels (../emulation/launchers.cpp), so that the same
// driver runs them: on arrays that end where their memory ends.

#include "cpu/kernels.h"

#define DPPO_EXPORT extern "C" __attribute__((visibility("default")))

using namespace megatron_dppo;

DPPO_EXPORT const char* emulated_row_partials(const PartialsArguments* args, int) {
  cpu::row_partials(*args);
  return nullptr;
}
DPPO_EXPORT const char* emulated_merge_partials(const MergeArguments* args) {
  cpu::merge_partials(*args);
  return nullptr;
}
DPPO_EXPORT const char* emulated_tile_nodes(const TileNodesArguments* args) {
  cpu::tile_nodes(*args);
  return nullptr;
}
DPPO_EXPORT const char* emulated_merge_tile_nodes(const MergeNodesArguments* args) {
  cpu::merge_tile_nodes(*args);
  return nullptr;
}
DPPO_EXPORT const char* emulated_policy_backward(const BackwardArguments* args, int) {
  cpu::policy_backward(*args);
  return nullptr;
}
DPPO_EXPORT const char* emulated_shard_divergence(const DivergenceArguments* args, int) {
  cpu::shard_divergence(*args);
  return nullptr;
}
DPPO_EXPORT int64_t emulated_divergence_segments(const DivergenceArguments*, int) { return 1; }
DPPO_EXPORT const char* emulated_token_objective(const TokenObjectiveArguments* args, int) {
  cpu::token_objective(*args);
  return nullptr;
}
DPPO_EXPORT const char* emulated_policy_gradient(const PolicyGradientArguments* args, int) {
  cpu::policy_gradient(*args);
  return nullptr;
}
DPPO_EXPORT const char* emulated_check_tokens(const TokenChecksArguments* args, int) {
  cpu::check_tokens(*args);
  return nullptr;
}
DPPO_EXPORT const char* emulated_tile_hash(const TileHashArguments* args) {
  cpu::tile_hash(*args);
  return nullptr;
}
// How the launcher's caller sees a piece (csrc/operators/tile_hash.cpp).
DPPO_EXPORT void describe_piece(TilePiece* piece, const TileMatrix* matrix, int64_t first_word, int64_t first_tile,
                                int64_t first_task) {
  *piece = tile_piece(*matrix, first_word, first_tile, first_task);
}

DPPO_EXPORT void fp32_product(const Fp32ProductArguments* args) { cpu::fp32_product(*args); }
