// The CPU forward for one level of x86-64, with a C interface for ctypes: see test_cpu_levels.py.

#include "cpu/kernels.h"

#define DPPO_EXPORT extern "C" __attribute__((visibility("default")))

DPPO_EXPORT void row_partials(const megatron_dppo::PartialsArguments* args) { megatron_dppo::cpu::row_partials(*args); }
DPPO_EXPORT void merge_partials(const megatron_dppo::MergeArguments* args) {
  megatron_dppo::cpu::merge_partials(*args);
}
