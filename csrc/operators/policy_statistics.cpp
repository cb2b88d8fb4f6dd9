// Operators on logits: statistics of a policy, their gradient, and the divergence of two policies.

#include "operators/operators.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "core/arguments.h"
#include "cpu/kernels.h"
#include "operators/checks.h"
#include "operators/cuda_device.h"
#include "operators/row_arguments.h"

namespace megatron_dppo {

Tensor row_partials(const Tensor& logits, const optional<Tensor>& rows, const optional<Tensor>& mask,
                    const Tensor& target, const optional<Tensor>& topk_ids, double temperature, int64_t first_column,
                    int64_t num_columns) {
  PartialsArguments args =
      check_row_arguments(logits, rows, mask, target, topk_ids, temperature, first_column, num_columns);
  Tensor partials = at::empty({args.selection.n, kTopk + args.topk}, logits.options().dtype(at::kFloat));
  args.partials = partials.mutable_data_ptr<float>();
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(logits)) {
    const CudaDevice device(logits);
    const cuda::PartialsPlan plan = cuda::plan_row_partials(args, cuda::multiprocessor_count());
    const Tensor workspace = at::empty({plan.workspace_bytes}, logits.options().dtype(at::kByte));
    check_launch("row_partials", cuda::launch_row_partials(args, plan, workspace.mutable_data_ptr(), device.stream()));
    return partials;
  }
#endif
  cpu::row_partials(args);
  return partials;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_partials(const Tensor& partials,
                                                                          const optional<Tensor>& mask) {
  TORCH_CHECK_VALUE(partials.dim() == 3 && partials.size(0) >= 1 && partials.size(2) >= kTopk,
                    "partials must have shape [shards, n, 5 + K], not ", partials.sizes());
  TORCH_CHECK_VALUE(partials.scalar_type() == at::kFloat, "partials must be float32, not ", partials.scalar_type());
  TORCH_CHECK_VALUE(partials.is_contiguous(), "partials must be contiguous");
  const int64_t n = partials.size(1), topk = partials.size(2) - kTopk;
  RowOutputs outputs(n, topk, partials);
  const MergeArguments args = outputs.arguments(partials, check_mask(mask, partials, n));
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(partials)) {
    const CudaDevice device(partials);
    check_launch("merge_partials", cuda::launch_merge_partials(args, device.stream()));
    return outputs.tensors();
  }
#endif
  cpu::merge_partials(args);
  return outputs.tensors();
}

void policy_backward(const Tensor& logits, const Tensor& grad, const optional<Tensor>& mask, const Tensor& target,
                     const Tensor& max, const Tensor& log_sum, const Tensor& log_prob, const Tensor& entropy,
                     const optional<Tensor>& grad_log_prob, const optional<Tensor>& grad_entropy, double temperature,
                     int64_t first_column, int64_t num_columns) {
  BackwardArguments args{};
  args.logits = check_logits(logits, first_column, num_columns);
  check_matrix("grad", grad);
  check_rows_apart("grad", grad);
  TORCH_CHECK_VALUE(
      grad.sizes() == logits.sizes() && grad.scalar_type() == logits.scalar_type() && grad.device() == logits.device(),
      "grad must match logits in shape, dtype and device");
  TORCH_CHECK_VALUE(at::get_overlap_status(grad, logits) != at::MemOverlapStatus::Partial,
                    "grad must be the logits themselves or share no memory with them");
  const int64_t n = args.n = logits.size(0);
  args.mask = check_mask(mask, logits, n);
  check_like("target", target, logits, at::kLong, {n});
  args.target = target.const_data_ptr<int64_t>();
  args.max = check_per_row("max", max, logits, n);
  args.log_sum = check_per_row("log_sum", log_sum, logits, n);
  args.log_prob = check_per_row("log_prob", log_prob, logits, n);
  args.entropy = check_per_row("entropy", entropy, logits, n);
  args.grad_log_prob = check_per_row("grad_log_prob", grad_log_prob, logits, n);
  args.grad_entropy = check_per_row("grad_entropy", grad_entropy, logits, n);
  args.temperature = check_temperature(temperature);
  args.grad_logits = grad.mutable_data_ptr();
  args.grad_row_stride = grad.stride(0);
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(logits)) {
    const CudaDevice device(logits);
    check_launch("policy_backward", cuda::launch_policy_backward(args, cuda::multiprocessor_count(), device.stream()));
    return;
  }
#endif
  cpu::policy_backward(args);
}

void policy_backward_(const Tensor& logits, const optional<Tensor>& mask, const Tensor& target, const Tensor& max,
                      const Tensor& log_sum, const Tensor& log_prob, const Tensor& entropy,
                      const optional<Tensor>& grad_log_prob, const optional<Tensor>& grad_entropy, double temperature,
                      int64_t first_column, int64_t num_columns) {
  policy_backward(logits, logits, mask, target, max, log_sum, log_prob, entropy, grad_log_prob, grad_entropy,
                  temperature, first_column, num_columns);
}

Tensor shard_divergence(const Tensor& logits, const Tensor& rollout_logits, const optional<Tensor>& rows,
                        const optional<Tensor>& mask, const Tensor& max, const Tensor& log_sum,
                        const Tensor& rollout_max, const Tensor& rollout_log_sum, const optional<Tensor>& known_ids,
                        const optional<Tensor>& known_log_prob, const optional<Tensor>& log_rescale,
                        std::string distance, double temperature, int64_t first_column, int64_t num_columns) {
  DivergenceArguments args{};
  args.policy = check_logits(logits, first_column, num_columns);
  check_matrix("rollout_logits", rollout_logits);
  TORCH_CHECK_VALUE(rollout_logits.sizes() == logits.sizes() && rollout_logits.scalar_type() == logits.scalar_type() &&
                        rollout_logits.device() == logits.device(),
                    "rollout_logits must match logits in shape, dtype and device");
  args.rollout = check_logits(rollout_logits, first_column, num_columns);
  args.selection = check_selection(rows, mask, logits);
  const int64_t n = args.selection.n;
  args.policy_normaliser = {check_per_row("max", max, logits, n), check_per_row("log_sum", log_sum, logits, n)};
  args.rollout_normaliser = {check_per_row("rollout_max", rollout_max, logits, n),
                             check_per_row("rollout_log_sum", rollout_log_sum, logits, n)};
  if (known_ids.has_value()) {
    TORCH_CHECK_VALUE(known_log_prob.has_value() && log_rescale.has_value(),
                      "known_ids needs known_log_prob and log_rescale");
    args.known = check_ids("known_ids", *known_ids, logits, n);
    check_like("known_log_prob", *known_log_prob, logits, at::kFloat, {n, args.known});
    args.known_ids = known_ids->const_data_ptr<int64_t>();
    args.known_log_prob = known_log_prob->const_data_ptr<float>();
    args.log_rescale = check_per_row("log_rescale", log_rescale, logits, n);
  }
  args.distance = choice_of<Distance>("distance", distance, {{"tv", Distance::kTv}, {"kl", Distance::kKl}});
  args.temperature = check_temperature(temperature);
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(logits)) {
    const CudaDevice device(logits);
    const int64_t segments = cuda::divergence_segments(args, cuda::multiprocessor_count());
    const Tensor sums = at::empty({n, segments}, logits.options().dtype(at::kFloat));
    args.sums = sums.mutable_data_ptr<float>();
    check_launch("shard_divergence", cuda::launch_shard_divergence(args, segments, device.stream()));
    return segments == 1 ? sums.view({n}) : sums.sum(1);
  }
#endif
  Tensor sums = at::empty({n}, logits.options().dtype(at::kFloat));
  args.sums = sums.mutable_data_ptr<float>();
  cpu::shard_divergence(args);
  return sums;
}

}  // namespace megatron_dppo
