// The emulated machine's interface: what a kernel on fibers may ask of it. cuda_emulation.h gives it CUDA's names,
// scheduler.cpp implements it. Without macros, so that both can include it.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace megatron_dppo::emulation {

struct Context {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Context context;  // of the fiber that runs

using Body = void (*)(void* argument);

// Whatever a kernel does wrong is thrown out of run_grid as std::runtime_error.
void run_grid(const char* kernel, dim3 grid, dim3 block, Body body, void* argument);
void sync_threads(const char* file, int line);
void thread_fence();
uint64_t exchange(unsigned mask, uint64_t value, int source_lane);  // the value that `source_lane` brought
void* shared_array(const char* file, int line, size_t bytes);       // this block's array of that source line
int lane();

}  // namespace megatron_dppo::emulation
