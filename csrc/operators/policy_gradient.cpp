// The operator that turns logits into their gradient under a policy gradient.

#include "operators/operators.h"

#include <ATen/ops/empty.h>

#include "core/policy_gradient_arguments.h"
#include "cpu/kernels.h"
#include "operators/checks.h"
#include "operators/cuda_device.h"
#include "operators/trust_region_settings.h"

namespace megatron_dppo {

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_gradient_(
    const Tensor& logits, const optional<Tensor>& mask, const Tensor& target, const Tensor& log_mu,
    const Tensor& advantages, const optional<Tensor>& topk_ids, const optional<Tensor>& topk_log_mu,
    const optional<Tensor>& token_weights, double temperature, int64_t vocab_size, double scale, std::string divergence,
    std::string direction, std::string trust_region, at::ArrayRef<double> limits) {
  TORCH_CHECK_VALUE(vocab_size > 0, "vocab_size must be positive, not ", vocab_size);
  PolicyGradientArguments args{};
  PartialsArguments& partials = args.partials;
  partials.logits = check_logits(logits, 0, vocab_size);
  check_rows_apart("logits", logits);
  const int64_t n = logits.size(0);
  partials.selection = check_selection(optional<Tensor>(), mask, logits);
  check_like("target", target, logits, at::kLong, {n});
  partials.target = target.const_data_ptr<int64_t>();
  partials.temperature = check_temperature(temperature);
  TORCH_CHECK_VALUE(topk_ids.has_value() == topk_log_mu.has_value(), "topk_ids and topk_log_mu must be given together");
  if (topk_ids.has_value()) {
    partials.topk = check_ids("topk_ids", *topk_ids, logits, n);
    check_like("topk_log_mu", *topk_log_mu, logits, at::kFloat, {n, partials.topk});
    partials.topk_ids = topk_ids->const_data_ptr<int64_t>();
    args.objective.topk_log_mu = topk_log_mu->const_data_ptr<float>();
  }
  const auto floats = [&](at::IntArrayRef shape) { return at::empty(shape, logits.options().dtype(at::kFloat)); };
  const Tensor scratch = floats({n, kTopk + partials.topk + 3});  // the partials, then three numbers a row
  partials.partials = scratch.mutable_data_ptr<float>();
  float* const per_row = partials.partials + n * (kTopk + partials.topk);

  Tensor log_prob = floats({n}), entropy = floats({n}), collision = floats({n});
  Tensor topk_log_prob = floats({n, partials.topk});
  args.merge = {partials.partials,
                1,
                n,
                partials.topk,
                partials.selection.mask,
                log_prob.mutable_data_ptr<float>(),
                entropy.mutable_data_ptr<float>(),
                collision.mutable_data_ptr<float>(),
                topk_log_prob.mutable_data_ptr<float>(),
                per_row,
                per_row + n};

  TokenObjectiveArguments& objective = args.objective;
  objective.n = n;
  objective.topk = partials.topk;
  objective.vocab_size = vocab_size;
  objective.log_mu = check_per_row("log_mu", log_mu, logits, n);
  objective.log_pi = args.merge.log_prob;
  objective.advantage = check_per_row("advantages", advantages, logits, n);
  objective.entropy = args.merge.entropy;
  objective.collision = args.merge.collision;
  objective.target = partials.target;
  objective.mask = partials.selection.mask;
  objective.topk_ids = partials.topk_ids;
  objective.topk_log_pi = args.merge.topk_log_prob;
  objective.settings = check_settings(divergence, direction, trust_region, limits);
  TORCH_CHECK_VALUE(objective.settings.divergence != Divergence::kGiven,
                    "divergence='given' would have to be known before the logits are read");

  args.token_weights = check_per_row("token_weights", token_weights, logits, n);
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale must be finite, not ", scale);
  args.scale = static_cast<float>(scale);
  args.grad_log_prob = per_row + 2 * n;

  BackwardArguments& backward = args.backward;
  backward.logits = partials.logits;
  backward.n = n;
  backward.mask = partials.selection.mask;
  backward.target = partials.target;
  backward.max = args.merge.max;
  backward.log_sum = args.merge.log_sum;
  backward.log_prob = args.merge.log_prob;
  backward.entropy = args.merge.entropy;
  backward.grad_log_prob = args.grad_log_prob;
  backward.temperature = partials.temperature;
  backward.grad_logits = logits.mutable_data_ptr();
  backward.grad_row_stride = logits.stride(0);
#if defined(DPPO_WITH_CUDA)
  if (is_on_cuda(logits)) {
    const CudaDevice device(logits);
    const int64_t blocks = cuda::policy_gradient_blocks(args, cuda::multiprocessor_count(), cuda::l2_cache_bytes());
    check_launch("policy_gradient_", cuda::launch_policy_gradient(args, blocks, device.stream()));
    return {log_prob, entropy, collision, topk_log_prob};
  }
#endif
  cpu::policy_gradient(args);
  return {log_prob, entropy, collision, topk_log_prob};
}

}  // namespace megatron_dppo
