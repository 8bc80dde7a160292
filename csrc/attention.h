#pragma once

#include <cstdint>

#include "paged_cache.h"

// What gather_attention and dense_attention share: softmax(logit) v over some positions of a paged
// cache, with logit_t = softmax_scale q . k_t or, where softcap is not 0, softcap
// tanh(softmax_scale q . k_t / softcap). The work is split over these positions. A query is one
// query token and query head; split s of a query leaves (out, lse) of its part in the workspace,
// and the splits' parts are then merged.
namespace hata {

struct AttentionParams {
  PageTable table;
  KvCache cache;
  DType dtype;  // of q and out
  int q_len, num_heads;
  int num_splits;  // 1 needs no workspace
  float softmax_scale;
  float softcap;  // 0: none

  const void* q;       // [batch, q_len, num_heads, head_dim], last dimension contiguous
  void* out;           // [batch, q_len, num_heads, head_dim], contiguous
  float* lse;          // [batch, q_len, num_heads], contiguous
  float* out_partial;  // workspace [num_splits, batch, q_len, num_heads, head_dim]
  float* lse_partial;  // workspace [num_splits, batch, q_len, num_heads]

  int64_t q_batch_stride, q_token_stride, q_head_stride;
};

constexpr int group_of(const AttentionParams& p) {
  return p.num_heads / p.cache.num_kv_heads;
}

constexpr int64_t num_queries_of(const AttentionParams& p) {
  return int64_t{p.table.batch} * p.q_len * p.num_heads;
}

// Two blocks for each of an H100's 132 multiprocessors, with at least kMinRowsPerSplit positions
// each. By the shape alone, because the workspace is sized by it; clusters (sm_90) choose for
// themselves.
inline constexpr int kTargetBlocks = 264;
inline constexpr int kMinRowsPerSplit = 64;
inline constexpr int kMaxSplits = 128;

// How many splits share each of `num_lists` lists of up to `num_positions` positions.
constexpr int attention_num_splits(int64_t num_lists, int64_t num_positions) {
  if (num_lists <= 0) return 1;
  const int64_t wanted = kTargetBlocks / num_lists;
  const int64_t useful = (num_positions + kMinRowsPerSplit - 1) / kMinRowsPerSplit;
  const int64_t splits = wanted < useful ? wanted : useful;
  return static_cast<int>(splits < 1 ? 1 : (splits < kMaxSplits ? splits : kMaxSplits));
}

}  // namespace hata
