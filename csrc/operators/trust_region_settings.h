// The rule that decides about tokens, from its names in Python.
#pragma once

#include <string>

#include "core/token_objective_arguments.h"
#include "operators/checks.h"

namespace megatron_dppo {

inline TrustRegionSettings check_settings(const std::string& divergence, const std::string& direction,
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
                                             {"uniform_tail", Direction::kUniformTail},
                                             {"symmetric", Direction::kSymmetric}});
  settings.trust_region = choice_of<TrustRegion>("trust_region", trust_region,
                                                 {{"mask", TrustRegion::kMask},
                                                  {"smooth", TrustRegion::kSmooth},
                                                  {"ppo_clip", TrustRegion::kPpoClip},
                                                  {"cispo", TrustRegion::kCispo},
                                                  {"none", TrustRegion::kNone}});
  settings.limits = limits_from(limits.data());
  return settings;
}

}  // namespace megatron_dppo
