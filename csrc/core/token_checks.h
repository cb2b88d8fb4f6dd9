// Whether one token's values are possible: megatron_dppo/loss/checks.py is the definition.
#pragma once

#include <cmath>

#include "platform.h"
#include "token_checks_arguments.h"

namespace megatron_dppo {

struct CheckedValue {
  bool fine;
  double value;  // that is not fine, or the last one looked at
};

// Fails on NaN too.
DPPO_HOST_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.402823466e+38f; }

DPPO_HOST_DEVICE bool in_vocabulary(const TokenChecksArguments& args, int64_t id) {
  return id >= 0 && id < args.vocab_size;
}

// What `check` finds at token i.
DPPO_HOST_DEVICE CheckedValue check_token(const TokenChecksArguments& args, int check, int64_t i) {
  CheckedValue found{true, 0.0};
  const int64_t begin = i * args.topk, end = begin + args.topk;
  switch (check) {
    case kTargetInVocabulary:
      return {in_vocabulary(args, args.target[i]), static_cast<double>(args.target[i])};
    case kAdvantageFinite:
      return {is_finite(args.advantage[i]), args.advantage[i]};
    case kLogMuPossible:
      return {is_finite(args.log_mu[i]) && args.log_mu[i] <= args.log_prob_tolerance, args.log_mu[i]};
    case kTopkIdsInVocabulary:
      for (int64_t k = begin; found.fine && k < end; ++k)
        found = {in_vocabulary(args, args.topk_ids[k]), static_cast<double>(args.topk_ids[k])};
      return found;
    case kTopkLogMuPossible:
      for (int64_t k = begin; found.fine && k < end; ++k)
        found = {args.topk_log_mu[k] <= args.log_prob_tolerance, args.topk_log_mu[k]};
      return found;
    case kTopkMassPossible:
      for (int64_t k = begin; k < end; ++k) found.value += exp(static_cast<double>(args.topk_log_mu[k]));
      found.fine = found.value <= 1.0 + args.mass_tolerance;
      return found;
    case kReferenceLogProbFinite:
      if (args.ref_log_prob != nullptr) found = {is_finite(args.ref_log_prob[i]), args.ref_log_prob[i]};
      return found;
  }
  return found;
}

// Writes the row of a check whose first bad token is `position`, or -1 and zeros.
DPPO_HOST_DEVICE void write_check(const TokenChecksArguments& args, int check, int64_t position) {
  double* const row = args.record + 3 * check;
  row[0] = static_cast<double>(position);
  row[1] = position < 0 ? 0.0 : check_token(args, check, position).value;
  row[2] = position < 0 ? 0.0 : static_cast<double>(args.target[position]);
}

}  // namespace megatron_dppo
