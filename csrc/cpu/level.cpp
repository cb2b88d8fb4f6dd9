// What the processor decides when the library is loaded: see DPPO_CPU_CLONES.

#include <cstring>
#include <initializer_list>

#include "kernels.h"
#include "vector_math.h"

namespace megatron_dppo::cpu {
namespace {

#if defined(__x86_64__)
[[maybe_unused]] bool processor_has(const char* level) {
  if (std::strcmp(level, "x86-64") == 0) return true;
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (std::strcmp(level, "x86-64-v3") == 0) return v3;
  return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const char* level() {
#if defined(DPPO_CPU_LEVEL)
  return DPPO_CPU_LEVEL;
#elif defined(DPPO_HAS_CPU_CLONES)
  for (const char* clone : {"x86-64-v4", "x86-64-v3"})
    if (processor_has(clone)) return clone;
  return "x86-64";
#else
  return "";
#endif
}

bool level_is_supported() {
#if defined(DPPO_CPU_LEVEL)
  return processor_has(DPPO_CPU_LEVEL);
#else
  return true;
#endif
}

}  // namespace megatron_dppo::cpu
