// The Python module megatron_dppo._C: importing it registers the operators (operators/registration.cpp), and its
// attributes tell how they were built.

#include <pybind11/pybind11.h>

#include <cstddef>

#include "core/metric_constants.h"
#include "core/policy_gradient_arguments.h"
#include "core/token_checks_arguments.h"
#include "core/token_objective_arguments.h"
#include "cpu/cache.h"
#include "cpu/kernels.h"

#if !defined(DPPO_CUDA_ARCHS)
#define DPPO_CUDA_ARCHS ""
#endif

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

pybind11::tuple fp32_product_dtypes() {
  using namespace megatron_dppo;
  pybind11::list names;
  if (cpu::has_fp32_product(Dtype::kBFloat16)) names.append("bfloat16");
  if (cpu::has_fp32_product(Dtype::kFloat16)) names.append("float16");
  return names;
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
  m.attr("fp32_product_dtypes") = fp32_product_dtypes();
  m.attr("torch_version") = DPPO_TORCH_VERSION;
  m.attr("cpu_l2_bytes") = megatron_dppo::cpu::l2_cache_bytes();
  m.attr("cache_share") = megatron_dppo::kCacheShare;
  m.attr("limit_names") = names_of(megatron_dppo::kLimitNames);
  m.attr("mean_names") = names_of(megatron_dppo::kMeanNames);
  m.attr("maximum_names") = names_of(megatron_dppo::kMaximumNames);
  m.attr("check_names") = names_of(megatron_dppo::kTokenCheckNames);
  m.attr("metric_constants") = metric_constants();
}
