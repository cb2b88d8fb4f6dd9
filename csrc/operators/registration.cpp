// Schemas of the operators, and what they are on each device and to autograd.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <initializer_list>
#include <vector>

#include "operators/operators.h"

// The namespace of torch.ops. Kernels that run on another machine than its own have one too (tests/csrc/emulation).
#if !defined(DPPO_OPERATORS)
#define DPPO_OPERATORS megatron_dppo
#endif
// torch's macros take a name literally.
#define DPPO_LIBRARY(NAMESPACE, m) TORCH_LIBRARY(NAMESPACE, m)
#define DPPO_LIBRARY_IMPL(NAMESPACE, KEY, m) TORCH_LIBRARY_IMPL(NAMESPACE, KEY, m)

namespace megatron_dppo {
namespace {

// Operators that write to an argument.
constexpr std::initializer_list<const char*> kWriting = {
    "policy_backward", "policy_backward_", "policy_gradient_", "tile_hash",
#if !defined(DPPO_HOST_EMULATION)
    "fp32_product_",
#endif
};

// The tensors among an operator's arguments that it writes to.
std::vector<at::Tensor> written_tensors(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const std::vector<c10::Argument>& arguments = op.schema().arguments();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i)
    if (arguments[i].alias_info() != nullptr && arguments[i].alias_info()->isWrite())
      written.push_back(stack[stack.size() - arguments.size() + i].toTensor());
  return written;
}

void count_as_modified(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const std::vector<at::Tensor> written = written_tensors(op, *stack);
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& tensor : written) tensor.unsafeGetTensorImpl()->bump_version();
}

// Integers have no gradient, whatever they are computed from.
void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  bool differentiable = false;
  for (const at::Tensor& tensor : written_tensors(op, *stack)) differentiable |= tensor.is_floating_point();
  const size_t count = op.schema().arguments().size();
  for (size_t i = stack->size() - count; differentiable && at::GradMode::is_enabled() && i < stack->size(); ++i)
    TORCH_CHECK(!(*stack)[i].isTensor() || !(*stack)[i].toTensor().requires_grad(), op.operator_name(),
                " has no derivative: call it under torch.no_grad(), or with tensors that need no gradient");
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

#define DPPO_BACKWARD_INPUTS                                                                                          \
  "Tensor? mask, Tensor target, Tensor max, Tensor log_sum, Tensor log_prob, Tensor entropy, Tensor? grad_log_prob, " \
  "Tensor? grad_entropy, float temperature, int first_column, int num_columns) -> ()"

DPPO_LIBRARY(DPPO_OPERATORS, m) {
  m.def(
      "row_partials(Tensor logits, Tensor? rows, Tensor? mask, Tensor target, Tensor? topk_ids, float temperature, "
      "int first_column, int num_columns) -> Tensor");
  m.def(
      "merge_partials(Tensor partials, Tensor? mask) -> "
      "(Tensor log_prob, Tensor entropy, Tensor collision, Tensor topk_log_prob, Tensor max, Tensor log_sum)");
  m.def(
      "tile_nodes(Tensor logits, Tensor? rows, Tensor? mask, Tensor target, Tensor? topk_ids, float temperature, "
      "int first_column, int num_columns, int nodes) -> Tensor");
  m.def(
      "merge_tile_nodes(Tensor partials, Tensor? mask, float temperature, int shard_tiles, int nodes) -> "
      "(Tensor log_prob, Tensor entropy, Tensor collision, Tensor topk_log_prob, Tensor max, Tensor log_sum)");
  m.def("policy_backward(Tensor logits, Tensor(a!) grad, " DPPO_BACKWARD_INPUTS);
  m.def("policy_backward_(Tensor(a!) logits, " DPPO_BACKWARD_INPUTS);
  m.def(
      "shard_divergence(Tensor logits, Tensor rollout_logits, Tensor? rows, Tensor? mask, Tensor max, Tensor log_sum, "
      "Tensor rollout_max, Tensor rollout_log_sum, Tensor? known_ids, Tensor? known_log_prob, Tensor? log_rescale, "
      "str distance, float temperature, int first_column, int num_columns) -> Tensor");
  m.def(
      "token_objective(Tensor log_mu, Tensor log_pi, Tensor advantages, Tensor entropy, Tensor collision, "
      "Tensor target, Tensor? mask, Tensor? topk_ids, Tensor? topk_log_mu, Tensor? topk_log_pi, "
      "Tensor? given_divergence, int vocab_size, *, str divergence, str direction, str trust_region, float[] limits) "
      "-> (Tensor coefficient, Tensor weight, Tensor divergence, Tensor means, Tensor maxima, Tensor histogram, "
      "Tensor loss, Tensor tokens)");
  m.def(
      "policy_gradient_(Tensor(a!) logits, Tensor? mask, Tensor target, Tensor log_mu, Tensor advantages, "
      "Tensor? topk_ids, Tensor? topk_log_mu, Tensor? token_weights, float temperature, int vocab_size, float scale, "
      "*, str divergence, str direction, str trust_region, float[] limits) -> "
      "(Tensor log_prob, Tensor entropy, Tensor collision, Tensor topk_log_prob)");
  m.def(
      "check_tokens(Tensor target, Tensor advantages, Tensor log_mu, Tensor? mask, Tensor? topk_ids, "
      "Tensor? topk_log_mu, Tensor? ref_log_prob, int vocab_size, *, float log_prob_tolerance, float mass_tolerance) "
      "-> Tensor");
  m.def(
      "tile_hash(Tensor(a!) sums, Tensor[] sources, int[] rows, int[] columns, int[] first_words, int[] first_tiles) "
      "-> ()");
#if !defined(DPPO_HOST_EMULATION)
  m.def("fp32_product_(Tensor(a!) sums, Tensor a, Tensor b, bool accumulate) -> ()");
#endif
}

#define DPPO_REGISTER(DEVICE)                     \
  DPPO_LIBRARY_IMPL(DPPO_OPERATORS, DEVICE, m) {  \
    m.impl("row_partials", row_partials);         \
    m.impl("merge_partials", merge_partials);     \
    m.impl("tile_nodes", tile_nodes);             \
    m.impl("merge_tile_nodes", merge_tile_nodes); \
    m.impl("policy_backward", policy_backward);   \
    m.impl("policy_backward_", policy_backward_); \
    m.impl("shard_divergence", shard_divergence); \
    m.impl("token_objective", token_objective);   \
    m.impl("policy_gradient_", policy_gradient_); \
    m.impl("check_tokens", check_tokens);         \
    m.impl("tile_hash", tile_hash);               \
  }
DPPO_REGISTER(CPU)
#if !defined(DPPO_HOST_EMULATION)  // a GPU's is cuBLAS's
DPPO_LIBRARY_IMPL(DPPO_OPERATORS, CPU, m) { m.impl("fp32_product_", fp32_product_); }
#endif
#if defined(DPPO_WITH_CUDA) && !defined(DPPO_HOST_EMULATION)
DPPO_REGISTER(CUDA)
#endif

// To autograd the operators are functions without a derivative, which ops/policy_stats.py and ops/fused_linear.py have:
// whoever differentiates one gets an error. torch's fallback does that for those that return something; what the others
// write to has to count as modified as well, or a tensor that was saved for another backward would give a wrong
// gradient in silence, and torch's fallback for that looks at returned tensors only.
DPPO_LIBRARY_IMPL(DPPO_OPERATORS, Autograd, m) {
  for (const char* name : {"row_partials", "merge_partials", "tile_nodes", "merge_tile_nodes", "shard_divergence",
                           "token_objective", "check_tokens"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  for (const char* name : kWriting) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
}
DPPO_LIBRARY_IMPL(DPPO_OPERATORS, ADInplaceOrView, m) {
  for (const char* name : kWriting) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&count_as_modified>());
}

}  // namespace megatron_dppo
