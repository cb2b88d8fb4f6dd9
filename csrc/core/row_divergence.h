// One column's share of D(mu || pi), from a logit under either policy: megatron_dppo/ops/torch_backend.py,
// shard_divergence.
#pragma once

#include "arguments.h"
#include "largest_logit.h"
#include "probability.h"

namespace megatron_dppo {

constexpr float kLn2 = 0.693147181f;
constexpr float kLog2Zero = kLogZero * kLog2E;

// A row of one policy. y = log2 p of the logit x is (x - max) log2(e) / T - offset; `max` is of the logits, not of z.
struct LogProbRow {
  float max, offset;
};

DPPO_HOST_DEVICE LogProbRow policy_row(const DivergenceArguments& args, int64_t i) {
  return {largest_logit(args.policy_normaliser.max[i], args.temperature, args.policy.dtype),
          args.policy_normaliser.log_sum[i] * kLog2E};
}
DPPO_HOST_DEVICE LogProbRow rollout_row(const DivergenceArguments& args, int64_t i) {
  const float rescale = args.log_rescale != nullptr ? args.log_rescale[i] : 0.f;
  return {largest_logit(args.rollout_normaliser.max[i], args.temperature, args.rollout.dtype),
          (args.rollout_normaliser.log_sum[i] - rescale) * kLog2E};
}

// This shard's column of a known id; anything outside [0, num_columns) is another shard's, or no id at all.
DPPO_HOST_DEVICE int64_t known_column(const DivergenceArguments& args, int64_t slot) {
  return args.known_ids[slot] < 0 ? -1 : args.known_ids[slot] - args.policy.first_column;
}

}  // namespace megatron_dppo
