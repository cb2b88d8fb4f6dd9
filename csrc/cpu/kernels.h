// The CPU kernels. They read and write caller-checked memory and use at::parallel_for's threads.
#pragma once

#include "../core/arguments.h"

namespace megatron_dppo::cpu {

void row_partials(const PartialsArguments& args);
void merge_partials(const MergeArguments& args);
void policy_backward(const BackwardArguments& args);

}  // namespace megatron_dppo::cpu
