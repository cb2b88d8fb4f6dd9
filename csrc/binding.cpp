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

#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "core/arguments.h"
#include "core/tile_hash_arguments.h"
#include "core/token_objective_arguments.h"
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

void check_like(const char* name, const Tensor& tensor, const Tensor& other, at::ScalarType dtype,
                at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), name, " is on ", tensor.device(), ", the first argument on ",
                    other.device());
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

// The value that a name stands for.
template <typename Value>
Value choice_of(const char* argument, const std::string& name,
                std::initializer_list<std::pair<const char*, Value>> choices) {
  std::string names;
  for (const auto& [choice, value] : choices) {
    if (name == choice) return value;
    names += (names.empty() ? "" : ", ") + std::string(choice);
  }
  TORCH_CHECK_VALUE(false, argument, " must be one of ", names, ", not '", name, "'");
}

LogitsShard check_logits(const Tensor& logits, int64_t first_column, int64_t num_columns) {
  check_matrix("logits", logits);
  TORCH_CHECK_VALUE(num_columns >= 0 && num_columns <= logits.size(1), "num_columns must be in [0, ", logits.size(1),
                    "], not ", num_columns);
  return {logits.const_data_ptr(), dtype_of(logits), logits.size(1), logits.stride(0), first_column, num_columns};
}

RowMask check_mask(const optional<Tensor>& mask, const Tensor& like, int64_t n) {
  if (!mask.has_value()) return {nullptr};
  check_like("mask", *mask, like, at::kBool, {n});
  return {mask->const_data_ptr<bool>()};
}

// On a GPU the rows' values are the caller's promise: looking at them would stop the stream.
RowSelection check_selection(const optional<Tensor>& rows, const optional<Tensor>& mask, const Tensor& logits) {
  TORCH_CHECK_VALUE(!rows.has_value() || !mask.has_value(), "rows and mask exclude each other");
  if (!rows.has_value()) return {nullptr, check_mask(mask, logits, logits.size(0)), logits.size(0)};
  check_like("rows", *rows, logits, at::kLong, {rows->numel()});
  TORCH_CHECK_VALUE(rows->numel() <= logits.size(0), "rows lists ", rows->numel(), " rows; logits have ",
                    logits.size(0));
  const int64_t* values = rows->const_data_ptr<int64_t>();
  for (int64_t i = 0; logits.is_cpu() && i < rows->numel(); ++i)
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < logits.size(0), "rows holds ", values[i], "; logits have ",
                      logits.size(0), " rows");
  return {values, {nullptr}, rows->numel()};
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

Tensor row_partials(const Tensor& logits, const optional<Tensor>& rows, const optional<Tensor>& mask,
                    const Tensor& target, const optional<Tensor>& topk_ids, double temperature, int64_t first_column,
                    int64_t num_columns) {
  PartialsArguments args{};
  args.logits = check_logits(logits, first_column, num_columns);
  args.selection = check_selection(rows, mask, logits);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_partials(const Tensor& partials,
                                                                          const optional<Tensor>& mask) {
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
      check_mask(mask, partials, n),
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

// `grad` may be `logits` itself, or must not overlap it.
void policy_backward(const Tensor& logits, const Tensor& grad, const optional<Tensor>& mask, const Tensor& target,
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
  if (logits.is_cuda()) {
    const c10::DeviceGuard guard(logits.device());
    check_launch("policy_backward",
                 cuda::launch_policy_backward(args, cuda::multiprocessor_count(), current_stream(logits)));
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

// Each row's D(mu || pi) over this shard's columns.
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
    TORCH_CHECK_VALUE(known_ids->dim() == 2, "known_ids must be a matrix [n, S], not ", known_ids->sizes());
    TORCH_CHECK_VALUE(known_log_prob.has_value() && log_rescale.has_value(),
                      "known_ids needs known_log_prob and log_rescale");
    args.known = known_ids->size(1);
    check_like("known_ids", *known_ids, logits, at::kLong, {n, args.known});
    check_like("known_log_prob", *known_log_prob, logits, at::kFloat, {n, args.known});
    args.known_ids = known_ids->const_data_ptr<int64_t>();
    args.known_log_prob = known_log_prob->const_data_ptr<float>();
    args.log_rescale = check_per_row("log_rescale", log_rescale, logits, n);
  }
  args.distance = choice_of<Distance>("distance", distance, {{"tv", Distance::kTv}, {"kl", Distance::kKl}});
  args.temperature = check_temperature(temperature);
#if defined(DPPO_WITH_CUDA)
  if (logits.is_cuda()) {
    const c10::DeviceGuard guard(logits.device());
    const int64_t segments = cuda::divergence_segments(args, cuda::multiprocessor_count());
    const Tensor sums = at::empty({n, segments}, logits.options().dtype(at::kFloat));
    args.sums = sums.mutable_data_ptr<float>();
    check_launch("shard_divergence", cuda::launch_shard_divergence(args, segments, current_stream(logits)));
    return segments == 1 ? sums.view({n}) : sums.sum(1);
  }
#endif
  Tensor sums = at::empty({n}, logits.options().dtype(at::kFloat));
  args.sums = sums.mutable_data_ptr<float>();
  cpu::shard_divergence(args);
  return sums;
}

TrustRegionSettings check_settings(const std::string& divergence, const std::string& direction,
                                   const std::string& trust_region, at::ArrayRef<double> limits) {
  TORCH_CHECK_VALUE(limits.size() == kNumLimits, "limits must have ", kNumLimits,
                    " values (limit_names of megatron_dppo._C), not ", limits.size());
  TrustRegionSettings settings{};
  settings.divergence = choice_of<Divergence>("divergence", divergence,
                                              {{"binary_tv", Divergence::kBinaryTv},
                                               {"binary_kl", Divergence::kBinaryKl},
                                               {"topk_tv", Divergence::kTopkTv},
                                               {"topk_kl", Divergence::kTopkKl},
                                               {"given", Divergence::kGiven}});
  settings.direction = choice_of<Direction>("direction", direction,
                                            {{"ratio", Direction::kRatio},
                                             {"exact_collision", Direction::kExactCollision},
                                             {"aggregated_tail", Direction::kAggregatedTail},
                                             {"uniform_tail", Direction::kUniformTail}});
  settings.trust_region = choice_of<TrustRegion>("trust_region", trust_region,
                                                 {{"mask", TrustRegion::kMask},
                                                  {"smooth", TrustRegion::kSmooth},
                                                  {"ppo_clip", TrustRegion::kPpoClip},
                                                  {"cispo", TrustRegion::kCispo},
                                                  {"none", TrustRegion::kNone}});
  settings.limits = limits_from(limits.data());
  return settings;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_objective(
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
    TORCH_CHECK_VALUE(topk_ids->dim() == 2, "topk_ids must be a matrix [n, K], not ", topk_ids->sizes());
    args.topk = topk_ids->size(1);
    check_like("topk_ids", *topk_ids, log_mu, at::kLong, {n, args.topk});
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
  Tensor totals = at::empty({kNumTotals}, log_mu.options().dtype(at::kDouble));
  Tensor histogram = at::empty({kHistogramSize}, log_mu.options().dtype(at::kLong));
  args.coefficient = coefficient.mutable_data_ptr<float>();
  args.weight = weight.mutable_data_ptr<float>();
  args.divergence = measured.mutable_data_ptr<float>();
  args.totals = totals.mutable_data_ptr<double>();
  args.histogram = histogram.mutable_data_ptr<int64_t>();
#if defined(DPPO_WITH_CUDA)
  if (log_mu.is_cuda()) {
    const c10::DeviceGuard guard(log_mu.device());
    const int multiprocessors = cuda::multiprocessor_count();
    const int64_t bytes = cuda::token_objective_workspace_bytes(n, multiprocessors);
    const Tensor workspace = at::empty({bytes}, log_mu.options().dtype(at::kByte));
    check_launch("token_objective", cuda::launch_token_objective(args, multiprocessors, workspace.mutable_data_ptr(),
                                                                 current_stream(log_mu)));
    return {coefficient, weight, measured, totals, histogram};
  }
#endif
  cpu::token_objective(args);
  return {coefficient, weight, measured, totals, histogram};
}

constexpr int64_t kMaxParameterWords = int64_t{1} << 60;  // no sum or product of sizes overflows

TileMatrix check_piece(int64_t i, const Tensor& source, const Tensor& sums, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(source.device() == sums.device(), "piece ", i, " is on ", source.device(), ", sums on ",
                    sums.device());
  TORCH_CHECK_VALUE(source.dim() == 2 && (source.size(1) <= 1 || source.stride(1) == 1), "piece ", i,
                    " must be a matrix with contiguous columns, not of shape ", source.sizes(), " and strides ",
                    source.strides());
  const auto bytes = static_cast<int64_t>(source.element_size());
  TORCH_CHECK_VALUE(bytes == 2 || bytes == 4 || bytes == 8, "piece ", i, " must have elements of 2, 4 or 8 bytes, not ",
                    source.scalar_type());
  TORCH_CHECK_VALUE(rows >= source.size(0) && columns >= source.size(1), "piece ", i, " of shape ", source.sizes(),
                    " is larger than the ", rows, " x ", columns, " that it is part of");
  TORCH_CHECK_VALUE(columns == 0 || rows <= kMaxParameterWords / columns, "piece ", i, " has ", rows, " x ", columns,
                    " elements, which is too many");
  TORCH_CHECK_VALUE(rows * columns * bytes % 4 == 0, "piece ", i, " has ", rows, " x ", columns, " elements of ", bytes,
                    " bytes, which are not whole words of 4 bytes");
  return {source.const_data_ptr(), bytes, source.stride(0), source.size(0), source.size(1), rows, columns};
}

// Adds the sums of all pieces of weights to `sums` [2, tiles] (core/tile_hash.h): piece i is sources[i], with zeros up
// to rows[i] x columns[i], from word first_words[i] of its parameter on. Its first tile is sums[:, first_tiles[i]].
void tile_hash(const Tensor& sums, at::TensorList sources, at::IntArrayRef rows, at::IntArrayRef columns,
               at::IntArrayRef first_words, at::IntArrayRef first_tiles) {
  TORCH_CHECK_VALUE(sums.dim() == 2, "sums must have shape [2, tiles], not ", sums.sizes());
  const int64_t total_tiles = sums.size(1);
  check_like("sums", sums, sums, at::kInt, {2, total_tiles});
  const auto n = static_cast<int64_t>(sources.size());
  for (const at::IntArrayRef list : {rows, columns, first_words, first_tiles})
    TORCH_CHECK_VALUE(static_cast<int64_t>(list.size()) == n, "rows, columns, first_words and first_tiles must have ",
                      n, " values, one for each source, not ", list.size());
  // Pinned: the copy to a GPU then waits for nothing.
  const auto options = at::TensorOptions().dtype(at::kLong).pinned_memory(sums.is_cuda());
  Tensor descriptions = at::empty({n, sizeof(TilePiece) / sizeof(int64_t)}, options);
  auto* const pieces = reinterpret_cast<TilePiece*>(descriptions.mutable_data_ptr<int64_t>());
  int64_t num_tasks = 0;
  for (int64_t i = 0; i < n; ++i) {
    const TileMatrix matrix = check_piece(i, sources[i], sums, rows[i], columns[i]);
    TORCH_CHECK_VALUE(first_words[i] >= 0 && first_words[i] <= kMaxParameterWords, "piece ", i, " begins at word ",
                      first_words[i]);
    pieces[i] = tile_piece(matrix, first_words[i], first_tiles[i], num_tasks);
    const int64_t tiles = pieces[i].num_tiles();
    TORCH_CHECK_VALUE(first_tiles[i] >= 0 && first_tiles[i] <= total_tiles - tiles, "piece ", i, " has ", tiles,
                      " tiles, from number ", first_tiles[i], " on; sums have ", total_tiles);
    num_tasks += tiles;
  }
#if defined(DPPO_WITH_CUDA)
  if (sums.is_cuda()) {
    const c10::DeviceGuard guard(sums.device());
    const Tensor on_device = descriptions.to(sums.device(), /*non_blocking=*/true);
    const auto* there = reinterpret_cast<const TilePiece*>(on_device.const_data_ptr<int64_t>());
    const TileHashArguments args{there, n, num_tasks, sums.mutable_data_ptr<int32_t>(), total_tiles};
    check_launch("tile_hash", cuda::launch_tile_hash(args, current_stream(sums)));
    return;
  }
#endif
  cpu::tile_hash({pieces, n, num_tasks, sums.mutable_data_ptr<int32_t>(), total_tiles});
}

}  // namespace

#define DPPO_BACKWARD_INPUTS                                                                                          \
  "Tensor? mask, Tensor target, Tensor max, Tensor log_sum, Tensor log_prob, Tensor entropy, Tensor? grad_log_prob, " \
  "Tensor? grad_entropy, float temperature, int first_column, int num_columns) -> ()"

TORCH_LIBRARY(megatron_dppo, m) {
  m.def(
      "row_partials(Tensor logits, Tensor? rows, Tensor? mask, Tensor target, Tensor? topk_ids, float temperature, "
      "int first_column, int num_columns) -> Tensor");
  m.def(
      "merge_partials(Tensor partials, Tensor? mask) -> "
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
      "-> (Tensor coefficient, Tensor weight, Tensor divergence, Tensor totals, Tensor histogram)");
  m.def(
      "tile_hash(Tensor(a!) sums, Tensor[] sources, int[] rows, int[] columns, int[] first_words, int[] first_tiles) "
      "-> ()");
}

#define DPPO_REGISTER(DEVICE)                     \
  TORCH_LIBRARY_IMPL(megatron_dppo, DEVICE, m) {  \
    m.impl("row_partials", row_partials);         \
    m.impl("merge_partials", merge_partials);     \
    m.impl("policy_backward", policy_backward);   \
    m.impl("policy_backward_", policy_backward_); \
    m.impl("shard_divergence", shard_divergence); \
    m.impl("token_objective", token_objective);   \
    m.impl("tile_hash", tile_hash);               \
  }
DPPO_REGISTER(CPU)
#if defined(DPPO_WITH_CUDA)
DPPO_REGISTER(CUDA)
#endif

}  // namespace megatron_dppo

namespace {

template <size_t N>
pybind11::tuple names_of(const char* const (&names)[N]) {
  pybind11::tuple tuple(N);
  for (size_t i = 0; i < N; ++i) tuple[i] = names[i];
  return tuple;
}

pybind11::dict metric_constants() {
  using namespace megatron_dppo;
  constexpr ProbabilityBinEdges edges = probability_bin_edges();
  pybind11::tuple bins(kProbabilityBins + 1);
  for (int i = 0; i <= kProbabilityBins; ++i) bins[i] = edges.values[i];
  pybind11::dict constants;
  constants["reference_clip"] = kReferenceClip;
  constants["bad_update_drop"] = kBadUpdateDrop;
  constants["probability_bins"] = bins;
  constants["histogram_lowest"] = kHistogramLowest;
  constants["histogram_highest"] = kHistogramHighest;
  constants["histogram_bins_per_decade"] = kHistogramBinsPerDecade;
  return constants;
}

}  // namespace

// megatron_dppo/_C.pyi says what each of them is.
PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.megatron_dppo and tells how it was built.";
  m.attr("cuda_archs") = DPPO_CUDA_ARCHS;
  m.attr("compiler") = __VERSION__;
  m.attr("flags") = DPPO_BUILD_FLAGS;
  m.attr("cpu_level") = megatron_dppo::cpu::level();
  m.attr("cpu_level_is_supported") = megatron_dppo::cpu::level_is_supported();
  m.attr("torch_version") = DPPO_TORCH_VERSION;
  m.attr("limit_names") = names_of(megatron_dppo::kLimitNames);
  m.attr("total_names") = names_of(megatron_dppo::kTotalNames);
  m.attr("metric_constants") = metric_constants();
}
