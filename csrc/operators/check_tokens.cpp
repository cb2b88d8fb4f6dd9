// The operator that looks for impossible values in the loss's inputs.

#include <ATen/ops/empty.h>

#include "core/token_checks_arguments.h"
#include "cpu/kernels.h"
#include "operators/checks.h"
#include "operators/cuda_device.h"
#include "operators/operators.h"

namespace megatron_dppo {

Tensor check_tokens(const Tensor& target, const Tensor& advantages, const Tensor& log_mu, const optional<Tensor>& mask,
                    const optional<Tensor>& topk_ids, const optional<Tensor>& topk_log_mu,
                    const optional<Tensor>& ref_log_prob, int64_t vocab_size, double log_prob_tolerance,
                    double mass_tolerance) {
  TokenChecksArguments args{};
  TORCH_CHECK_VALUE(target.dim() == 1, "target must be a vector [n], not ", target.sizes());
  const int64_t n = args.n = target.size(0);
  check_like("target", target, target, at::kLong, {n});
  args.target = target.const_data_ptr<int64_t>();
  args.advantage = check_per_row("advantages", advantages, target, n);
  args.log_mu = check_per_row("log_mu", log_mu, target, n);
  args.ref_log_prob = check_per_row("ref_log_prob", ref_log_prob, target, n);
  args.mask = check_mask(mask, target, n);
  TORCH_CHECK_VALUE(topk_ids.has_value() == topk_log_mu.has_value(), "topk_ids and topk_log_mu must be given together");
  if (topk_ids.has_value()) {
    args.topk = check_ids("topk_ids", *topk_ids, target, n);
    check_like("topk_log_mu", *topk_log_mu, target, at::kFloat, {n, args.topk});
    args.topk_ids = topk_ids->const_data_ptr<int64_t>();
    args.topk_log_mu = topk_log_mu->const_data_ptr<float>();
  }
  TORCH_CHECK_VALUE(vocab_size > 0, "vocab_size must be positive, not ", vocab_size);
  args.vocab_size = vocab_size;
  args.log_prob_tolerance = static_cast<float>(log_prob_tolerance);
  args.mass_tolerance = mass_tolerance;

  Tensor record = at::empty({kNumTokenChecks, 3}, target.options().dtype(at::kDouble));
  args.record = record.mutable_data_ptr<double>();
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(target)) {
    const CudaDevice device(target);
    const Tensor workspace = at::empty({kTokenChecksWorkspaceBytes}, target.options().dtype(at::kByte));
    check_launch("check_tokens", cuda::launch_check_tokens(args, cuda::multiprocessor_count(),
                                                           workspace.mutable_data_ptr(), device.stream()));
    return record;
  }
#endif
  cpu::check_tokens(args);
  return record;
}

}  // namespace megatron_dppo
