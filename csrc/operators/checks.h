// What every operator asks of its arguments. The kernels trust what they are given: nothing is checked after this.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "core/arguments.h"

namespace megatron_dppo {

using at::Tensor;
using std::optional;

inline Dtype dtype_of(const Tensor& logits) {
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

inline void check_like(const char* name, const Tensor& tensor, const Tensor& other, at::ScalarType dtype,
                       at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), name, " is on ", tensor.device(), ", the first argument on ",
                    other.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", not ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", not ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_matrix(const char* name, const Tensor& matrix) {
  TORCH_CHECK_VALUE(matrix.dim() == 2, name, " must be a matrix [N, V/TP], not ", matrix.sizes());
  TORCH_CHECK_VALUE(matrix.size(1) <= 1 || matrix.stride(1) == 1, name,
                    " must have contiguous columns; its strides are ", matrix.strides());
}

// A matrix that is written row by row: an element that two rows share (an expanded tensor) would get either's value.
inline void check_rows_apart(const char* name, const Tensor& matrix) {
  TORCH_CHECK_VALUE(matrix.size(0) <= 1 || matrix.stride(0) >= matrix.size(1), name,
                    " has rows that share memory and cannot be written; its shape is ", matrix.sizes(),
                    ", its strides are ", matrix.strides());
}

inline float check_temperature(double temperature) {
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

inline LogitsShard check_logits(const Tensor& logits, int64_t first_column, int64_t num_columns) {
  check_matrix("logits", logits);
  TORCH_CHECK_VALUE(num_columns >= 0 && num_columns <= logits.size(1), "num_columns must be in [0, ", logits.size(1),
                    "], not ", num_columns);
  return {logits.const_data_ptr(), dtype_of(logits), logits.size(1), logits.stride(0), first_column, num_columns};
}

inline RowMask check_mask(const optional<Tensor>& mask, const Tensor& like, int64_t n) {
  if (!mask.has_value()) return {nullptr};
  check_like("mask", *mask, like, at::kBool, {n});
  return {mask->const_data_ptr<bool>()};
}

// On a GPU the rows' values are the caller's promise: looking at them would stop the stream.
inline RowSelection check_selection(const optional<Tensor>& rows, const optional<Tensor>& mask, const Tensor& logits) {
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

inline const float* check_per_row(const char* name, const optional<Tensor>& values, const Tensor& logits, int64_t n) {
  if (!values.has_value()) return nullptr;
  check_like(name, *values, logits, at::kFloat, {n});
  return values->const_data_ptr<float>();
}

// A few ids a row, [n, K]; K.
inline int64_t check_ids(const char* name, const Tensor& ids, const Tensor& like, int64_t n) {
  TORCH_CHECK_VALUE(ids.dim() == 2, name, " must be a matrix [n, K], not ", ids.sizes());
  check_like(name, ids, like, at::kLong, {n, ids.size(1)});
  return ids.size(1);
}

}  // namespace megatron_dppo
