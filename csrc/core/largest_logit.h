// Back from z = x / temperature to the largest logit x, which everything of its row is measured from.
#pragma once

#include <cstring>

#include "arguments.h"

namespace megatron_dppo {

// Rounding x / T and then its product with T leaves an error of one unit in the last place of single precision:
// at |x| = 10^4 that is 10^-3, a thousandth of every probability. A logit of 16 bits has 8 or 11 significant bits, so
// rounding to these gives x itself; an fp32 logit's own last bit stays uncertain unless T is 1.
DPPO_HOST_DEVICE float largest_logit(float max, float temperature, Dtype dtype) {
  const float product = max * temperature;
  if (dtype == Dtype::kFloat32) return product;
  const uint32_t dropped = dtype == Dtype::kBFloat16 ? 16 : 13;
  uint32_t bits;
  std::memcpy(&bits, &product, sizeof(bits));
  bits += (1u << (dropped - 1)) - 1 + ((bits >> dropped) & 1u);
  bits &= ~((1u << dropped) - 1);
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return product != product ? product : x;
}

}  // namespace megatron_dppo
