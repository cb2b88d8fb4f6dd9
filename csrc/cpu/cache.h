// What a core of this processor has of second-level cache.
#pragma once

#include <cstdint>

namespace megatron_dppo::cpu {

// 0 where the system does not tell.
int64_t l2_cache_bytes();

}  // namespace megatron_dppo::cpu
