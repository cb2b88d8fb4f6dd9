// The CPU kernels for one level of x86-64, with a C interface for ctypes: see ../cpu_level_library.py.

#include <cstddef>
#include <cstdint>
#include <new>

#include "cpu/kernels.h"

#define DPPO_EXPORT extern "C" __attribute__((visibility("default")))

using namespace megatron_dppo;

DPPO_EXPORT void row_partials(const PartialsArguments* args) { cpu::row_partials(*args); }
DPPO_EXPORT void merge_partials(const MergeArguments* args) { cpu::merge_partials(*args); }
DPPO_EXPORT void tile_nodes(const TileNodesArguments* args) { cpu::tile_nodes(*args); }
DPPO_EXPORT void merge_tile_nodes(const MergeNodesArguments* args) { cpu::merge_tile_nodes(*args); }
DPPO_EXPORT void policy_backward(const BackwardArguments* args) { cpu::policy_backward(*args); }
DPPO_EXPORT void shard_divergence(const DivergenceArguments* args) { cpu::shard_divergence(*args); }
DPPO_EXPORT void tile_hash(const TileHashArguments* args) { cpu::tile_hash(*args); }
// How the launcher's caller sees a piece (csrc/operators/tile_hash.cpp).
DPPO_EXPORT void describe_piece(TilePiece* piece, const TileMatrix* matrix, int64_t first_word, int64_t first_tile,
                                int64_t first_task) {
  *piece = tile_piece(*matrix, first_word, first_tile, first_task);
}

// What the kernels allocate, from memory of this library: an emulated processor must not enter the heap of the process
// that emulates it. Nothing is handed back; the kernels' few vectors of a call begin again at the beginning.
namespace {
alignas(64) std::byte memory[1 << 24];
size_t used = 0;
}  // namespace

DPPO_EXPORT void forget_allocations() { used = 0; }

void* operator new(size_t bytes) {
  void* block = memory + used;
  used += (bytes + 63) / 64 * 64;
  if (used > sizeof(memory)) __builtin_trap();
  return block;
}
void operator delete(void*) noexcept {}
void operator delete(void*, size_t) noexcept {}
