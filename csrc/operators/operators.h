// The operators torch.ops.megatron_dppo.*: registration.cpp has their schemas. Each checks its arguments, makes the
// results and lets the kernels of the tensors' device fill them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace megatron_dppo {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor row_partials(const at::Tensor& logits, const OptionalTensor& rows, const OptionalTensor& mask,
                        const at::Tensor& target, const OptionalTensor& topk_ids, double temperature,
                        int64_t first_column, int64_t num_columns);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> merge_partials(
    const at::Tensor& partials, const OptionalTensor& mask);

// The two above in an order that no layout changes: [n, 4 nodes + 1 + K], the nodes of core/tile_tree.h that this shard
// holds, up to `nodes` empty ones, then the gathered logits.
at::Tensor tile_nodes(const at::Tensor& logits, const OptionalTensor& rows, const OptionalTensor& mask,
                      const at::Tensor& target, const OptionalTensor& topk_ids, double temperature,
                      int64_t first_column, int64_t num_columns, int64_t nodes);

// Every shard has `shard_tiles` tiles.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> merge_tile_nodes(
    const at::Tensor& partials, const OptionalTensor& mask, double temperature, int64_t shard_tiles, int64_t nodes);

// `grad` may be `logits` itself, or must not overlap it.
void policy_backward(const at::Tensor& logits, const at::Tensor& grad, const OptionalTensor& mask,
                     const at::Tensor& target, const at::Tensor& max, const at::Tensor& log_sum,
                     const at::Tensor& log_prob, const at::Tensor& entropy, const OptionalTensor& grad_log_prob,
                     const OptionalTensor& grad_entropy, double temperature, int64_t first_column, int64_t num_columns);

void policy_backward_(const at::Tensor& logits, const OptionalTensor& mask, const at::Tensor& target,
                      const at::Tensor& max, const at::Tensor& log_sum, const at::Tensor& log_prob,
                      const at::Tensor& entropy, const OptionalTensor& grad_log_prob,
                      const OptionalTensor& grad_entropy, double temperature, int64_t first_column,
                      int64_t num_columns);

// Each row's D(mu || pi) over this shard's columns.
at::Tensor shard_divergence(const at::Tensor& logits, const at::Tensor& rollout_logits, const OptionalTensor& rows,
                            const OptionalTensor& mask, const at::Tensor& max, const at::Tensor& log_sum,
                            const at::Tensor& rollout_max, const at::Tensor& rollout_log_sum,
                            const OptionalTensor& known_ids, const OptionalTensor& known_log_prob,
                            const OptionalTensor& log_rescale, std::string distance, double temperature,
                            int64_t first_column, int64_t num_columns);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
token_objective(const at::Tensor& log_mu, const at::Tensor& log_pi, const at::Tensor& advantages,
                const at::Tensor& entropy, const at::Tensor& collision, const at::Tensor& target,
                const OptionalTensor& mask, const OptionalTensor& topk_ids, const OptionalTensor& topk_log_mu,
                const OptionalTensor& topk_log_pi, const OptionalTensor& given_divergence, int64_t vocab_size,
                std::string divergence, std::string direction, std::string trust_region, at::ArrayRef<double> limits);

// A whole vocabulary's logits become the gradient of scale * loss, the loss being the weighted sum of
// what token_objective decides: -w r A. Returns the statistics as merge_partials does.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> policy_gradient_(
    const at::Tensor& logits, const OptionalTensor& mask, const at::Tensor& target, const at::Tensor& log_mu,
    const at::Tensor& advantages, const OptionalTensor& topk_ids, const OptionalTensor& topk_log_mu,
    const OptionalTensor& token_weights, double temperature, int64_t vocab_size, double scale, std::string divergence,
    std::string direction, std::string trust_region, at::ArrayRef<double> limits);

// The first token with an impossible value, for every check of core/token_checks.h.
at::Tensor check_tokens(const at::Tensor& target, const at::Tensor& advantages, const at::Tensor& log_mu,
                        const OptionalTensor& mask, const OptionalTensor& topk_ids, const OptionalTensor& topk_log_mu,
                        const OptionalTensor& ref_log_prob, int64_t vocab_size, double log_prob_tolerance,
                        double mass_tolerance);

// Adds the sums of all pieces of weights to `sums` [2, tiles] (core/tile_hash.h): piece i is sources[i], with zeros up
// to rows[i] x columns[i], from word first_words[i] of its parameter on. Its first tile is sums[:, first_tiles[i]].
void tile_hash(const at::Tensor& sums, at::TensorList sources, at::IntArrayRef rows, at::IntArrayRef columns,
               at::IntArrayRef first_words, at::IntArrayRef first_tiles);

// sums (+)= a @ b for two bfloat16 or two float16 matrices, in fp32. On a CPU only, and not on every processor.
void fp32_product_(const at::Tensor& sums, const at::Tensor& a, const at::Tensor& b, bool accumulate);

}  // namespace megatron_dppo
