// The hash by which SGLang's servers report what weights they hold, as its GPU kernel defines it.
//
// A parameter is a sequence of 32-bit words. Word i enters as fmix32(word ^ mix(i)), for two functions mix, and is
// added up modulo 2^32 within its tile of 8192 words. At the end a tile's two sums are mixed with the parameter's
// number of bytes and joined to 64 bits, which are added up over the tiles and mixed once more. Sums are free of order,
// so the parts of a parameter can be hashed apart.
#pragma once

#include <cstdint>

#include "platform.h"

namespace megatron_dppo {

// MurmurHash3's final mixing.
DPPO_HOST_DEVICE uint32_t fmix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

DPPO_HOST_DEVICE uint32_t rotate_left(uint32_t x, int bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_l(x, x, bits);  // one instruction; of shifts in a loop nvcc makes an addition and a shift
#else
  return (x << bits) | (x >> (32 - bits));
#endif
}

constexpr uint32_t kHashSeed = 0x243F6A88u;
constexpr uint32_t kOtherHashSeed = (kHashSeed * 0x9E3779B1u) ^ 0xDEADBEEFu;
constexpr uint32_t kPositionFactor = 0x27D4EB2Du, kOtherPositionFactor = 0x165667B1u;

// mix(i) = (i * factor + seed) ^ rotate_left(i). The first term is handed on from word to word: an addition each.
struct WordPosition {
  uint32_t index, term, other_term;

  DPPO_HOST_DEVICE explicit WordPosition(uint32_t i)
      : index(i), term(i * kPositionFactor + kHashSeed), other_term(i * kOtherPositionFactor + kOtherHashSeed) {}
  DPPO_HOST_DEVICE void advance(uint32_t words) {
    index += words;
    term += words * kPositionFactor;
    other_term += words * kOtherPositionFactor;
  }
};

// Of the words of one tile, or of some of them.
struct WordSums {
  uint32_t sum = 0, other_sum = 0;

  DPPO_HOST_DEVICE void add(uint32_t word, const WordPosition& at) {
    sum += fmix32(word ^ at.term ^ rotate_left(at.index, 15));
    other_sum += fmix32(word ^ at.other_term ^ rotate_left(at.index, 13));
  }
};

// What a whole tile adds to the parameter's 64-bit sum.
inline uint64_t finished_tile(const WordSums& sums, uint32_t parameter_bytes) {
  return static_cast<uint64_t>(fmix32(sums.sum ^ parameter_bytes)) << 32 | fmix32(sums.other_sum ^ parameter_bytes);
}

// splitmix64 of the sum over all tiles: what the server reports.
inline uint64_t finished_parameter(uint64_t sum) {
  sum = (sum ^ (sum >> 30)) * 0xBF58476D1CE4E5B9u;
  sum = (sum ^ (sum >> 27)) * 0x94D049BB133111EBu;
  return sum ^ (sum >> 31);
}

}  // namespace megatron_dppo
