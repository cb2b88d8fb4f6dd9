// Looks for impossible values: the first token that fails each check.

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../core/token_checks.h"
#include "kernels.h"

namespace megatron_dppo::cpu {
namespace {

constexpr int64_t kChunk = 512;

using Positions = std::array<int64_t, kNumTokenChecks>;

}  // namespace

void check_tokens(const TokenChecksArguments& args) {
  Positions none;
  none.fill(-1);
  std::vector<Positions> chunks((args.n + kChunk - 1) / kChunk, none);
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kChunk; i < std::min(end * kChunk, args.n); ++i) {
      if (args.mask.skips(i)) continue;
      Positions& first = chunks[i / kChunk];
      for (int check = 0; check < kNumTokenChecks; ++check)
        if (first[check] < 0 && !check_token(args, check, i).fine) first[check] = i;
    }
  });
  for (int check = 0; check < kNumTokenChecks; ++check) {
    const auto found = std::find_if(chunks.begin(), chunks.end(), [&](const Positions& p) { return p[check] >= 0; });
    write_check(args, check, found == chunks.end() ? -1 : (*found)[check]);
  }
}

}  // namespace megatron_dppo::cpu
