// The operators torch.ops.megatron_dppo.*: schemas, every check of their arguments, and the choice of device. The
// kernels below trust what they are given. Importing megatron_dppo._C registers the operators and tells how they were
// built.
//
// No CUDA header of torch is used: the stream comes from c10's device-neutral interface, so that this file compiles,
// links and imports against a CPU build of torch too.

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "core/arguments.h"
#include "cpu/kernels.h"

#if defined(DPPO_WITH_CUDA)
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/launch.h"
#endif

#if !defined(DPPO_CUDA_ARCHS)
#define DPPO_CUDA_ARCHS ""
#endif

namespace megatron_dppo {
namespace {

using at::Tensor;
using std::optional;

Dtype dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_VALUE(false, "logits must be float32, bfloat16 or float16, not ", logits.scalar_type());
  }
}

void check_like(const char* name, const Tensor& tensor, const Tensor& logits, at::ScalarType dtype,
                at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.device() == logits.device(), name, " is on ", tensor.device(), ", logits on ",
                    logits.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", not ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", not ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
}

void check_matrix(const char* name, const Tensor& matrix) {
  TORCH_CHECK_VALUE(matrix.dim() == 2, name, " must be a matrix [N, V/TP], not ", matrix.sizes());
  TORCH_CHECK_VALUE(matrix.size(1) <= 1 || matrix.stride(1) == 1, name,
                    " must have contiguous columns; its strides are ", matrix.strides());
}

float check_temperature(double temperature) {
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), "temperature must be positive and finite, not ",
                    temperature);
  return static_cast<float>(temperature);
}

LogitsShard check_logits(const Tensor& logits, int64_t first_column, int64_t num_columns) {
  check_matrix("logits", logits);
  TORCH_CHECK_VALUE(num_columns >= 0 && num_columns <= logits.size(1), "num_columns must be in [0, ", logits.size(1),
                    "], not ", num_columns);
  return {logits.const_data_ptr(), dtype_of(logits), logits.size(1), logits.stride(0), first_column, num_columns};
}

// On a GPU the rows' values are the caller's promise: looking at them would stop the stream.
RowSelection check_rows(const optional<Tensor>& rows, const Tensor& logits) {
  if (!rows.has_value()) return {nullptr, logits.size(0)};
  check_like("rows", *rows, logits, at::kLong, {rows->numel()});
  TORCH_CHECK_VALUE(rows->numel() <= logits.size(0), "rows lists ", rows->numel(), " rows; logits have ",
                    logits.size(0));
  const int64_t* values = rows->const_data_ptr<int64_t>();
  for (int64_t i = 0; logits.is_cpu() && i < rows->numel(); ++i)
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < logits.size(0), "rows holds ", values[i], "; logits have ",
                      logits.size(0), " rows");
  return {values, rows->numel()};
}

const float* check_per_row(const char* name, const optional<Tensor>& values, const Tensor& logits, int64_t n) {
  if (!values.has_value()) return nullptr;
  check_like(name, *values, logits, at::kFloat, {n});
  return values->const_data_ptr<float>();
}

#if defined(DPPO_WITH_CUDA)
cudaStream_t current_stream(const Tensor& tensor) {
  const c10::impl::VirtualGuardImpl device(c10::DeviceType::CUDA);
  return static_cast<cudaStream_t>(device.getStream(tensor.device()).native_handle());
}

void check_launch(const char* kernel, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "megatron_dppo: ", kernel, ": ", cudaGetErrorString(error));
}
#endif

Tensor row_partials(const Tensor& logits, const optional<Tensor>& rows, const Tensor& target,
                    const optional<Tensor>& topk_ids, double temperature, int64_t first_column, int64_t num_columns) {
  PartialsArguments args{};
  args.logits = check_logits(logits, first_column, num_columns);
  args.selection = check_rows(rows, logits);
  const int64_t n = args.selection.n;
  check_like("target", target, logits, at::kLong, {n});
  args.target = target.const_data_ptr<int64_t>();
  if (topk_ids.has_value()) {
    TORCH_CHECK_VALUE(topk_ids->dim() == 2, "topk_ids must be a matrix [n, K], not ", topk_ids->sizes());
    args.topk = topk_ids->size(1);
    check_like("topk_ids", *topk_ids, logits, at::kLong, {n, args.topk});
    args.topk_ids = topk_ids->const_data_ptr<int64_t>();
  }
  args.temperature = check_temperature(temperature);
  Tensor partials = at::empty({n, kTopk + args.topk}, logits.options().dtype(at::kFloat));
  args.partials = partials.mutable_data_ptr<float>();
#if defined(DPPO_WITH_CUDA)
  if (logits.is_cuda()) {
    const c10::DeviceGuard guard(logits.device());
    const cuda::PartialsPlan plan = cuda::plan_row_partials(args, cuda::multiprocessor_count());
    const Tensor workspace = at::empty({plan.workspace_bytes}, logits.options().dtype(at::kByte));
    check_launch("row_partials",
                 cuda::launch_row_partials(args, plan, workspace.mutable_data_ptr(), current_stream(logits)));
    return partials;
  }
#endif
  cpu::row_partials(args);
  return partials;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_partials(const Tensor& partials) {
  TORCH_CHECK_VALUE(partials.dim() == 3 && partials.size(0) >= 1 && partials.size(2) >= kTopk,
                    "partials must have shape [shards, n, 5 + K], not ", partials.sizes());
  TORCH_CHECK_VALUE(partials.scalar_type() == at::kFloat, "partials must be float32, not ", partials.scalar_type());
  TORCH_CHECK_VALUE(partials.is_contiguous(), "partials must be contiguous");
  const int64_t n = partials.size(1), topk = partials.size(2) - kTopk;
  const auto per_row = [&] { return at::empty({n}, partials.options()); };
  Tensor log_prob = per_row(), entropy = per_row(), collision = per_row(), max = per_row(), log_sum = per_row();
  Tensor topk_log_prob = at::empty({n, topk}, partials.options());
  const MergeArguments args{
      partials.const_data_ptr<float>(),
      partials.size(0),
      n,
      topk,
      log_prob.mutable_data_ptr<float>(),
      entropy.mutable_data_ptr<float>(),
      collision.mutable_data_ptr<float>(),
      topk_log_prob.mutable_data_ptr<float>(),
      max.mutable_data_ptr<float>(),
      log_sum.mutable_data_ptr<float>(),
  };
#if defined(DPPO_WITH_CUDA)
  if (partials.is_cuda()) {
    const c10::DeviceGuard guard(partials.device());
    check_launch("merge_partials", cuda::launch_merge_partials(args, current_stream(partials)));
    return {log_prob, entropy, collision, topk_log_prob, max, log_sum};
  }
#endif
  cpu::merge_partials(args);
  return {log_prob, entropy, collision, topk_log_prob, max, log_sum};
}

// Of `grad` only the selected rows are written. It may be `logits` itself, or must not overlap it.
void policy_backward(const Tensor& logits, const Tensor& grad, const optional<Tensor>& rows, const Tensor& target,
                     const Tensor& max, const Tensor& log_sum, const Tensor& log_prob, const Tensor& entropy,
                     const optional<Tensor>& grad_log_prob, const optional<Tensor>& grad_entropy, double temperature,
                     int64_t first_column, int64_t num_columns) {
  BackwardArguments args{};
  args.logits = check_logits(logits, first_column, num_columns);
  check_matrix("grad", grad);
  TORCH_CHECK_VALUE(
      grad.sizes() == logits.sizes() && grad.scalar_type() == logits.scalar_type() && grad.device() == logits.device(),
      "grad must match logits in shape, dtype and device");
  TORCH_CHECK_VALUE(at::get_overlap_status(grad, logits) != at::MemOverlapStatus::Partial,
                    "grad must be the logits themselves or share no memory with them");
  args.selection = check_rows(rows, logits);
  const int64_t n = args.selection.n;
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
  if (logits.is_cuda()) {
    const c10::DeviceGuard guard(logits.device());
    check_launch("policy_backward",
                 cuda::launch_policy_backward(args, cuda::multiprocessor_count(), current_stream(logits)));
    return;
  }
#endif
  cpu::policy_backward(args);
}

void policy_backward_(const Tensor& logits, const optional<Tensor>& rows, const Tensor& target, const Tensor& max,
                      const Tensor& log_sum, const Tensor& log_prob, const Tensor& entropy,
                      const optional<Tensor>& grad_log_prob, const optional<Tensor>& grad_entropy, double temperature,
                      int64_t first_column, int64_t num_columns) {
  policy_backward(logits, logits, rows, target, max, log_sum, log_prob, entropy, grad_log_prob, grad_entropy,
                  temperature, first_column, num_columns);
}

}  // namespace

#define DPPO_BACKWARD_INPUTS                                                                                          \
  "Tensor? rows, Tensor target, Tensor max, Tensor log_sum, Tensor log_prob, Tensor entropy, Tensor? grad_log_prob, " \
  "Tensor? grad_entropy, float temperature, int first_column, int num_columns) -> ()"

TORCH_LIBRARY(megatron_dppo, m) {
  m.def(
      "row_partials(Tensor logits, Tensor? rows, Tensor target, Tensor? topk_ids, float temperature, "
      "int first_column, int num_columns) -> Tensor");
  m.def(
      "merge_partials(Tensor partials) -> "
      "(Tensor log_prob, Tensor entropy, Tensor collision, Tensor topk_log_prob, Tensor max, Tensor log_sum)");
  m.def("policy_backward(Tensor logits, Tensor(a!) grad, " DPPO_BACKWARD_INPUTS);
  m.def("policy_backward_(Tensor(a!) logits, " DPPO_BACKWARD_INPUTS);
}

#define DPPO_REGISTER(DEVICE)                     \
  TORCH_LIBRARY_IMPL(megatron_dppo, DEVICE, m) {  \
    m.impl("row_partials", row_partials);         \
    m.impl("merge_partials", merge_partials);     \
    m.impl("policy_backward", policy_backward);   \
    m.impl("policy_backward_", policy_backward_); \
  }
DPPO_REGISTER(CPU)
#if defined(DPPO_WITH_CUDA)
DPPO_REGISTER(CUDA)
#endif

}  // namespace megatron_dppo

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.megatron_dppo and tells how it was built.";
  m.attr("cuda_archs") = DPPO_CUDA_ARCHS;  // "" where only the CPU kernels are in
  m.attr("compiler") = __VERSION__;
  m.attr("flags") = DPPO_BUILD_FLAGS;
  m.attr("torch_version") = DPPO_TORCH_VERSION;  // compiled against
}
