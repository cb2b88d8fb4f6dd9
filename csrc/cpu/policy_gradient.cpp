// Forward and backward of a policy gradient at once: a thread takes a whole row, and what it writes over the row it
// reads out of its core's cache.

#include "../core/policy_gradient.h"

#include <ATen/Parallel.h>

#include <vector>

#include "../core/dtype_switch.h"
#include "kernels.h"
#include "logits_row.h"
#include "row_tasks.h"

namespace megatron_dppo::cpu {
namespace {

template <typename T>
void policy_gradient_of(const PolicyGradientArguments& args) {
  const LogitsShard& logits = args.partials.logits;
  const float exp2_scale = kLog2E / args.partials.temperature;
  const RowMask& mask = args.partials.selection.mask;
  for (const bool inside : {true, false}) {  // one after the other: threads share out rows that are alike
    const std::vector<int64_t> rows = rows_of_mask(mask, args.partials.selection.n, inside);
    at::parallel_for(0, static_cast<int64_t>(rows.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = rows[k];
        T* const x = static_cast<T*>(args.backward.grad_logits) + i * logits.row_stride;
        if (inside) write_row(args.partials, x, i, reduce(x, logits.num_columns, exp2_scale));
        finish_row(args.merge, i);
        write_gradient(x, x, 0, logits.columns, logits.num_columns, decide_row(args, i), exp2_scale);
      }
    });
  }
}

}  // namespace

void policy_gradient(const PolicyGradientArguments& args) {
  switch_dtype(args.partials.logits.dtype, CpuElements(),
               [&](auto tag) { policy_gradient_of<typename decltype(tag)::Type>(args); });
}

}  // namespace megatron_dppo::cpu
