// The hash of a whole parameter, for SGLang's process on a CPU: its own hash there is another one than on a GPU
// (megatron_dppo/rollout/sglang/cpu_shim). A library of its own, called through ctypes: that process has another
// interpreter and another torch than the trainer, so that megatron_dppo._C cannot be loaded there.

#include <cstdint>

#include "../core/tile_hash.h"
#include "../core/tile_hash_arguments.h"
#include "../cpu/tile_words.h"

extern "C" __attribute__((visibility("default"))) uint64_t megatron_dppo_tile_hash(const void* data,
                                                                                   int64_t num_words) {
  using namespace megatron_dppo;
  uint64_t sum = 0;
  for (int64_t first = 0; first < num_words; first += kTileWords) {
    const int count = static_cast<int>(num_words - first < kTileWords ? num_words - first : kTileWords);
    const auto* tile = static_cast<const unsigned char*>(data) + 4 * first;
    sum +=
        finished_tile(cpu::hash_words(tile, count, static_cast<uint32_t>(first)), static_cast<uint32_t>(4 * num_words));
  }
  return finished_parameter(sum);
}
