// The one place that chooses between the CUDA toolkit and the host emulation of tests (tests/csrc/emulation).
#pragma once

#if defined(DPPO_HOST_EMULATION)
#include "cuda_emulation.h"  // build.sh beside it says where
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Static shared memory, and a launch. Both are macros because the emulation has to see them.
#define DPPO_SHARED(type, name, count) __shared__ type name[count]
#define DPPO_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__)
#define DPPO_LAUNCH_STATUS() cudaGetLastError()
#endif
