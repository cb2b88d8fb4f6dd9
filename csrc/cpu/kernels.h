// The CPU kernels. They read and write caller-checked memory and use at::parallel_for's threads.
#pragma once

#include "../core/arguments.h"
#include "../core/token_objective_arguments.h"

namespace megatron_dppo::cpu {

void row_partials(const PartialsArguments& args);
void merge_partials(const MergeArguments& args);
void policy_backward(const BackwardArguments& args);
void shard_divergence(const DivergenceArguments& args);  // into sums [n, 1]
void token_objective(const TokenObjectiveArguments& args);

}  // namespace megatron_dppo::cpu
