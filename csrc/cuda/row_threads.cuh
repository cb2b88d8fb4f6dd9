// How many threads a block has that takes a row of logits, or a segment of one.
#pragma once

namespace megatron_dppo::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

}  // namespace megatron_dppo::cuda
