// Merging what several blocks left in global memory: the block that comes last does it.
#pragma once

#include "toolchain.cuh"

namespace megatron_dppo::cuda {

// True in every thread of the block that comes last of `blocks`, which then sees what any thread of the others wrote
// before this call (read it with __ldcg: other blocks' writes do not reach the first-level cache). Called by all
// threads of a block. `finished` counts the blocks; it was 0 before the launch.
__device__ __forceinline__ bool is_last_block(unsigned* finished, unsigned blocks) {
  DPPO_SHARED(int, is_last, 1);
  __threadfence();  // what this thread wrote is visible before the count says so
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicAdd(finished, 1u) == blocks - 1;
  __syncthreads();
  if (is_last[0] == 0) return false;
  __threadfence();
  return true;
}

}  // namespace megatron_dppo::cuda
