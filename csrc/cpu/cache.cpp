#include "cache.h"

#include <unistd.h>

namespace megatron_dppo::cpu {

int64_t l2_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)  // glibc's
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return bytes > 0 ? bytes : 0;
#else
  return 0;
#endif
}

}  // namespace megatron_dppo::cpu
