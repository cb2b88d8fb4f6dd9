// The CPU kernels. They read and write caller-checked memory and use at::parallel_for's threads.
#pragma once

#include "../core/arguments.h"
#include "../core/fp32_product_arguments.h"
#include "../core/policy_gradient_arguments.h"
#include "../core/tile_hash_arguments.h"
#include "../core/token_checks_arguments.h"
#include "../core/token_objective_arguments.h"

namespace megatron_dppo::cpu {

void row_partials(const PartialsArguments& args);
void merge_partials(const MergeArguments& args);
void tile_nodes(const TileNodesArguments& args);
void merge_tile_nodes(const MergeNodesArguments& args);
void policy_backward(const BackwardArguments& args);
void shard_divergence(const DivergenceArguments& args);  // into sums [n, 1]
void token_objective(const TokenObjectiveArguments& args);
void policy_gradient(const PolicyGradientArguments& args);
void check_tokens(const TokenChecksArguments& args);
void tile_hash(const TileHashArguments& args);
void fp32_product(const Fp32ProductArguments& args);  // where there is one for its dtype

// Whether this processor has instructions for the product of such matrices, and torch uses them.
bool has_fp32_product(Dtype dtype);

// Which of the kernels' levels of x86-64 this processor takes, and whether it can run it: of kernels of all levels it
// takes one that it can, a build for one level may ask too much. "" where the compiler's own target is the only one.
const char* level();
bool level_is_supported();

}  // namespace megatron_dppo::cpu
