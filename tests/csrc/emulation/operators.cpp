// The operators of csrc/operators on the emulated machine, as torch.ops.megatron_dppo_emulated.*: for tensors on the
// CPU they do what they do for such on a GPU, their kernels included. One file, so that torch's headers are read once.

#include "operators/check_tokens.cpp"
#include "operators/policy_gradient.cpp"
#include "operators/policy_statistics.cpp"
#include "operators/registration.cpp"
#include "operators/tile_hash.cpp"
#include "operators/tile_nodes.cpp"
#include "operators/token_objective.cpp"
