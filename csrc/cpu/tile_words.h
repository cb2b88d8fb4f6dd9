// The inner loop of the weights' hash: words that lie next to each other in memory. Without torch, for a server's
// process uses it too (csrc/server).
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/tile_hash.h"
#include "vector_math.h"

namespace megatron_dppo::cpu {

// The sums of `count` words, the first of which is at `position`; memory need not be aligned.
DPPO_CPU_CLONES static WordSums hash_words(const void* data, int count, uint32_t position) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  WordPosition at(position);
  WordSums sums;
  for (int i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, bytes + 4 * static_cast<int64_t>(i), sizeof(word));
    sums.add(word, at);
    at.advance(1);
  }
  return sums;
}

}  // namespace megatron_dppo::cpu
