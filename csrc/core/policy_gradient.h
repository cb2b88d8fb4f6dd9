// From a row's statistics to its gradient, where the token is decided about in between. Every step is that of the
// kernels that make two passes; here they are put together.
#pragma once

#include "policy_gradient_arguments.h"
#include "row_outputs.h"
#include "token_objective.h"

namespace megatron_dppo {

// From row i's statistics to what its gradient is made of. A row outside of the mask has none.
DPPO_HOST_DEVICE RowGradient decide_row(const PolicyGradientArguments& args, int64_t i) {
  if (args.backward.mask.skips(i)) {
    args.grad_log_prob[i] = 0.f;
  } else {
    const float scale = args.token_weights != nullptr ? args.scale * args.token_weights[i] : args.scale;
    // A token without any probability has none that an update could scale.
    args.grad_log_prob[i] =
        args.merge.log_prob[i] == -INFINITY ? 0.f : decide_token(args.objective, i).coefficient * -scale;
  }
  return row_gradient(args.backward, i);
}

}  // namespace megatron_dppo
