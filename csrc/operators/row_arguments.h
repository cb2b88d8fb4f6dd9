// Arguments and results that operators on rows of logits have in common.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>

#include "operators/checks.h"

namespace megatron_dppo {

// All but `partials`, which the caller makes.
inline PartialsArguments check_row_arguments(const Tensor& logits, const optional<Tensor>& rows,
                                             const optional<Tensor>& mask, const Tensor& target,
                                             const optional<Tensor>& topk_ids, double temperature, int64_t first_column,
                                             int64_t num_columns) {
  PartialsArguments args{};
  args.logits = check_logits(logits, first_column, num_columns);
  args.selection = check_selection(rows, mask, logits);
  const int64_t n = args.selection.n;
  check_like("target", target, logits, at::kLong, {n});
  args.target = target.const_data_ptr<int64_t>();
  if (topk_ids.has_value()) {
    args.topk = check_ids("topk_ids", *topk_ids, logits, n);
    args.topk_ids = topk_ids->const_data_ptr<int64_t>();
  }
  args.temperature = check_temperature(temperature);
  return args;
}

// What the shards' partials are merged into.
struct RowOutputs {
  Tensor log_prob, entropy, collision, topk_log_prob, max, log_sum;

  RowOutputs(int64_t n, int64_t topk, const Tensor& like) {
    for (Tensor* values : {&log_prob, &entropy, &collision, &max, &log_sum}) *values = at::empty({n}, like.options());
    topk_log_prob = at::empty({n, topk}, like.options());
  }

  // For partials [shards, n, ...].
  MergeArguments arguments(const Tensor& partials, const RowMask& mask) {
    return {
        partials.const_data_ptr<float>(),
        partials.size(0),
        partials.size(1),
        topk_log_prob.size(1),
        mask,
        log_prob.mutable_data_ptr<float>(),
        entropy.mutable_data_ptr<float>(),
        collision.mutable_data_ptr<float>(),
        topk_log_prob.mutable_data_ptr<float>(),
        max.mutable_data_ptr<float>(),
        log_sum.mutable_data_ptr<float>(),
    };
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tensors() const {
    return {log_prob, entropy, collision, topk_log_prob, max, log_sum};
  }
};

}  // namespace megatron_dppo
