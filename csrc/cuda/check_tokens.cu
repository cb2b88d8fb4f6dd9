// Looks for impossible values in one launch: a thread takes a token at a time, and an atomic maximum of the distance
// from the end finds the first that fails. Where nothing is wrong there are no atomics. The block that comes last
// writes the record.

#include <algorithm>

#include "../core/token_checks.h"
#include "last_block.cuh"
#include "launch.h"
#include "toolchain.cuh"

namespace megatron_dppo::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerMultiprocessor = 4;
static_assert(kNumTokenChecks <= kThreads, "a thread for every check");

// Scratch memory, 0 before the launch.
struct Workspace {
  unsigned long long* from_end;  // [kNumTokenChecks] n - position of the first bad token
  unsigned* finished;
};

__global__ void __launch_bounds__(kThreads) check_tokens_kernel(TokenChecksArguments args, Workspace workspace) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < args.n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    if (args.mask.skips(i)) continue;
#pragma unroll
    for (int check = 0; check < kNumTokenChecks; ++check)
      if (!check_token(args, check, i).fine)
        atomicMax(workspace.from_end + check, static_cast<unsigned long long>(args.n - i));
  }
  if (!is_last_block(workspace.finished, gridDim.x)) return;
  if (threadIdx.x >= kNumTokenChecks) return;
  const auto from_end = static_cast<int64_t>(__ldcg(workspace.from_end + threadIdx.x));
  write_check(args, threadIdx.x, from_end == 0 ? -1 : args.n - from_end);
}

}  // namespace

cudaError_t launch_check_tokens(const TokenChecksArguments& args, int multiprocessors, void* workspace,
                                cudaStream_t stream) {
  const Workspace shared{static_cast<unsigned long long*>(workspace),
                         reinterpret_cast<unsigned*>(static_cast<unsigned long long*>(workspace) + kNumTokenChecks)};
  const cudaError_t error = cudaMemsetAsync(workspace, 0, kTokenChecksWorkspaceBytes, stream);
  if (error != cudaSuccess) return error;
  const int64_t wanted = (args.n + kThreads - 1) / kThreads;
  const auto blocks = static_cast<unsigned>(
      std::max<int64_t>(1, std::min<int64_t>(wanted, int64_t{kBlocksPerMultiprocessor} * multiprocessors)));
  DPPO_LAUNCH(check_tokens_kernel, dim3(blocks), dim3(kThreads), stream, args, shared);
  return DPPO_LAUNCH_STATUS();
}

}  // namespace megatron_dppo::cuda
