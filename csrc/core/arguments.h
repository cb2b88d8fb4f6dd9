// Arguments of the kernels that read logits, the same for CPU and CUDA. Pointers are to memory of the kernel's device.
//
// Of N rows of logits those of prompts and padding do not matter. Either a list names the n rows that do, and per-row
// arrays are compact, [n]; or a mask marks them, and per-row arrays are [N]. With z = x / temperature, what crosses
// between shards is in units of z.
#pragma once

#include <cstdint>

#include "platform.h"

namespace megatron_dppo {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// One rank's shard of the logits, [N, columns]; columns are contiguous.
struct LogitsShard {
  const void* data;
  Dtype dtype;
  int64_t columns;
  int64_t row_stride;    // elements from one row to the next
  int64_t first_column;  // global id of column 0
  int64_t num_columns;   // true vocabulary; the columns beyond are padding: never read, gradient exactly 0
};

// Rows outside are not read, nor is anything else that belongs to them; their results are 0.
struct RowMask {
  const bool* inside;  // [n], or null: all of them

  DPPO_HOST_DEVICE bool skips(int64_t i) const { return inside != nullptr && !inside[i]; }
};

// The n rows that the kernels' per-row arrays are about. Not both a list and a mask.
struct RowSelection {
  const int64_t* rows;  // [n] rows of the logits, or null: rows 0 to n - 1
  RowMask mask;
  int64_t n;

  DPPO_HOST_DEVICE int64_t row(int64_t i) const { return rows != nullptr ? rows[i] : i; }
  DPPO_HOST_DEVICE bool skips(int64_t i) const { return mask.skips(i); }
};

// Fields of a row's partials, as they travel in the all-gather; gathered logits are 0 on the shards that do not hold
// the id, so that a plain sum over shards selects them.
enum Partial : int64_t {
  kMax = 0,      // m = max z
  kRest = 1,     // sum exp(z - m) without the maximum's own term
  kTilt = 2,     // sum (z - m) exp(z - m)
  kSquares = 3,  // sum exp(2 (z - m)) without the maximum's own term
  kTarget = 4,   // z of the target
  kTopk = 5      // K more z follow
};

struct PartialsArguments {
  LogitsShard logits;
  RowSelection selection;
  const int64_t* target;    // [n] global ids
  const int64_t* topk_ids;  // [n, topk] global ids
  int64_t topk;
  float temperature;
  float* partials;  // [n, 5 + topk]  OUT
};

struct MergeArguments {
  const float* partials;  // [shards, n, 5 + topk]
  int64_t shards;
  int64_t n;
  int64_t topk;
  RowMask mask;
  float* log_prob;       // [n]        OUT
  float* entropy;        // [n]        OUT
  float* collision;      // [n]        OUT  sum of squared probabilities
  float* topk_log_prob;  // [n, topk]  OUT
  float* max;            // [n]        OUT  largest z
  float* log_sum;        // [n]        OUT  log of the sum of exp(z - max)
};

// The same in an order that no layout changes (tile_tree.h). A row's columns are the fields of its nodes, the z of its
// target and K more z.
struct TileNodesArguments {
  PartialsArguments row;  // partials is [n, 4 nodes + 1 + topk]
  int64_t num_tiles;      // of this shard, which begins with a tile
  int64_t nodes;          // at least as many as this shard has; the others are empty
};

struct MergeNodesArguments {
  MergeArguments merge;  // partials is [shards, n, 4 nodes + 1 + topk]
  int64_t shard_tiles;   // of every shard
  int64_t nodes;
  float temperature;
  float* waiting;  // [levels, n, 4] scratch, on CUDA

  DPPO_HOST_DEVICE int64_t columns() const { return 4 * nodes + 1 + merge.topk; }
};

struct BackwardArguments {
  LogitsShard logits;
  int64_t n;
  RowMask mask;                // rows outside are zero-filled
  const int64_t* target;       // [n] global ids
  const float* max;            // [n]
  const float* log_sum;        // [n]
  const float* log_prob;       // [n]
  const float* entropy;        // [n]
  const float* grad_log_prob;  // [n], or null: all 0
  const float* grad_entropy;   // [n], or null: all 0
  float temperature;
  void* grad_logits;  // [n, columns] of the logits' dtype  OUT; may be the logits themselves
  int64_t grad_row_stride;
};

enum class Distance : int { kTv = 0, kKl = 1 };

// What turns a row's logits into log-probabilities: log p = (z - max) - log_sum.
struct Normaliser {
  const float* max;      // [n]
  const float* log_sum;  // [n]
};

struct DivergenceArguments {
  LogitsShard policy, rollout;  // alike but for data and row_stride
  RowSelection selection;
  Normaliser policy_normaliser, rollout_normaliser;
  // Of a hybrid rollout policy; all others are rescaled. With known = 0 nothing is.
  const int64_t* known_ids;     // [n, known] global ids, distinct; -1 in slots that do not count
  const float* known_log_prob;  // [n, known]
  const float* log_rescale;     // [n], or null: all 0
  int64_t known;
  float temperature;
  Distance distance;
  float* sums;  // [n, segments]  OUT  this shard's share, in parts to be added up
};

}  // namespace megatron_dppo
