// The one place where the dtype of the logits becomes a C++ type.
#pragma once

#include "arguments.h"

namespace megatron_dppo {

template <typename T>
struct TypeTag {
  using Type = T;
};

// The C++ types that stand for the dtypes; CPU and CUDA kernels have their own.
template <typename Float32, typename BFloat16, typename Float16>
struct ElementTypes {};

// Calls f(TypeTag<T>()) with the T of `dtype`; f returns the same type for each.
template <typename Float32, typename BFloat16, typename Float16, typename Function>
auto switch_dtype(Dtype dtype, ElementTypes<Float32, BFloat16, Float16>, const Function& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(TypeTag<Float32>());
    case Dtype::kBFloat16:
      return f(TypeTag<BFloat16>());
    case Dtype::kFloat16:
      break;
  }
  return f(TypeTag<Float16>());
}

}  // namespace megatron_dppo
