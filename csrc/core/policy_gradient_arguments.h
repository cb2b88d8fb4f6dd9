// Arguments of the kernel that turns a whole vocabulary's logits into the gradient of a policy gradient in one pass,
// the same for CPU and CUDA: a row's statistics decide about its token, and its gradient follows while the row is still
// in a cache.
#pragma once

#include "arguments.h"
#include "token_objective_arguments.h"

namespace megatron_dppo {

// Of which part of the L2 cache the rows under way may take: the rest is for what else goes through it, the gradients
// that are being written back among it. csrc/module.cpp tells it to megatron_dppo/ops/logits_route.py.
constexpr double kCacheShare = 0.8;

// The parts are about the same n rows, and agree on every pointer that they share.
struct PolicyGradientArguments {
  PartialsArguments partials;         // of the only shard; its rows are all of them, perhaps masked
  MergeArguments merge;               // of these partials
  TokenObjectiveArguments objective;  // log_pi, entropy, collision, topk_log_pi are the merge's results; writes nothing
  BackwardArguments backward;         // over the logits; of grad_log_prob
  const float* token_weights;         // [n], or null: all 1
  float scale;                        // what the loss will be multiplied by
  float* grad_log_prob;               // [n]  OUT  d (scale * loss) / d log pi
};

}  // namespace megatron_dppo
