// The operator that decides about tokens: trust region, weight, and the sums of the metrics.

#include "operators/operators.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "core/token_objective_arguments.h"
#include "cpu/kernels.h"
#include "operators/checks.h"
#include "operators/cuda_device.h"
#include "operators/trust_region_settings.h"

namespace megatron_dppo {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_objective(
    const Tensor& log_mu, const Tensor& log_pi, const Tensor& advantages, const Tensor& entropy,
    const Tensor& collision, const Tensor& target, const optional<Tensor>& mask, const optional<Tensor>& topk_ids,
    const optional<Tensor>& topk_log_mu, const optional<Tensor>& topk_log_pi, const optional<Tensor>& given_divergence,
    int64_t vocab_size, std::string divergence, std::string direction, std::string trust_region,
    at::ArrayRef<double> limits) {
  TokenObjectiveArguments args{};
  TORCH_CHECK_VALUE(log_mu.dim() == 1, "log_mu must be a vector [n], not ", log_mu.sizes());
  const int64_t n = args.n = log_mu.size(0);
  args.log_mu = check_per_row("log_mu", log_mu, log_mu, n);
  args.log_pi = check_per_row("log_pi", log_pi, log_mu, n);
  args.advantage = check_per_row("advantages", advantages, log_mu, n);
  args.entropy = check_per_row("entropy", entropy, log_mu, n);
  args.collision = check_per_row("collision", collision, log_mu, n);
  args.given_divergence = check_per_row("given_divergence", given_divergence, log_mu, n);
  check_like("target", target, log_mu, at::kLong, {n});
  args.target = target.const_data_ptr<int64_t>();
  args.mask = check_mask(mask, log_mu, n);
  TORCH_CHECK_VALUE(topk_ids.has_value() == topk_log_mu.has_value() && topk_ids.has_value() == topk_log_pi.has_value(),
                    "topk_ids, topk_log_mu and topk_log_pi must be given together");
  if (topk_ids.has_value()) {
    args.topk = check_ids("topk_ids", *topk_ids, log_mu, n);
    check_like("topk_log_mu", *topk_log_mu, log_mu, at::kFloat, {n, args.topk});
    check_like("topk_log_pi", *topk_log_pi, log_mu, at::kFloat, {n, args.topk});
    args.topk_ids = topk_ids->const_data_ptr<int64_t>();
    args.topk_log_mu = topk_log_mu->const_data_ptr<float>();
    args.topk_log_pi = topk_log_pi->const_data_ptr<float>();
  }
  TORCH_CHECK_VALUE(vocab_size > 0, "vocab_size must be positive, not ", vocab_size);
  args.vocab_size = vocab_size;
  args.settings = check_settings(divergence, direction, trust_region, limits);
  TORCH_CHECK_VALUE((args.settings.divergence == Divergence::kGiven) == given_divergence.has_value(),
                    "given_divergence goes with divergence='given', and with no other");

  Tensor coefficient = at::empty_like(log_mu), weight = at::empty_like(log_mu), measured = at::empty_like(log_mu);
  Tensor means = at::empty({kNumMeans, 2}, log_mu.options().dtype(at::kDouble));
  Tensor maxima = at::empty({kNumMaxima}, log_mu.options().dtype(at::kDouble));
  Tensor histogram = at::empty({kHistogramSize}, log_mu.options().dtype(at::kLong));
  Tensor loss = at::empty({}, log_mu.options()), tokens = at::empty({}, log_mu.options().dtype(at::kLong));
  args.coefficient = coefficient.mutable_data_ptr<float>();
  args.weight = weight.mutable_data_ptr<float>();
  args.divergence = measured.mutable_data_ptr<float>();
  args.means = means.mutable_data_ptr<double>();
  args.maxima = maxima.mutable_data_ptr<double>();
  args.histogram = histogram.mutable_data_ptr<int64_t>();
  args.loss = loss.mutable_data_ptr<float>();
  args.tokens = tokens.mutable_data_ptr<int64_t>();
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(log_mu)) {
    const CudaDevice device(log_mu);
    const int multiprocessors = cuda::multiprocessor_count();
    const int64_t bytes = cuda::token_objective_workspace_bytes(n, multiprocessors);
    const Tensor workspace = at::empty({bytes}, log_mu.options().dtype(at::kByte));
    check_launch("token_objective",
                 cuda::launch_token_objective(args, multiprocessors, workspace.mutable_data_ptr(), device.stream()));
    return {coefficient, weight, measured, means, maxima, histogram, loss, tokens};
  }
#endif
  cpu::token_objective(args);
  return {coefficient, weight, measured, means, maxima, histogram, loss, tokens};
}

}  // namespace megatron_dppo
