#pragma once

#include "paged_cache.h"

namespace hata {

// For query token j of sequence b, query head i and the KV head h of its group:
//   out = sum_t softmax_t(softmax_scale q . k_t) v_t over the positions t in indices[b, j, h],
//   lse = ln sum_t exp(softmax_scale q . k_t), softmax in float32.
// Indices may come in any order; those below 0 or not below what token j sees are skipped. Where
// none is left, out = 0 and lse = -infinity.
struct GatherAttentionParams {
  PageTable table;
  KvCache cache;
  int q_len, num_heads;
  int top_k;
  int num_splits;  // blocks that share one (sequence, query token, KV head); 1 needs no workspace
  float softmax_scale;

  const void* q;           // [batch, q_len, num_heads, head_dim], last dimension contiguous
  const int32_t* indices;  // [batch, q_len, num_kv_heads, top_k], contiguous
  void* out;               // [batch, q_len, num_heads, head_dim], contiguous, dtype of q
  float* lse;              // [batch, q_len, num_heads], contiguous
  float* out_partial;      // workspace [num_splits, batch, q_len, num_heads, head_dim]
  float* lse_partial;      // workspace [num_splits, batch, q_len, num_heads]
  bool may_use_clusters;   // sm_90: no workspace, and as many splits as fit in one cluster
  // q, cache_seqlens and block_table were complete before the kernel before this one in the stream
  // began; what it writes are indices and rows of the caches.
  bool queries_are_ready;

  int64_t q_batch_stride, q_token_stride, q_head_stride;
};

// Two blocks for each of an H100's 132 multiprocessors, with at least kMinRowsPerSplit rows each.
// By the shape alone, because the workspace is sized by it; clusters (sm_90) choose for themselves.
inline constexpr int kTargetBlocks = 264;
inline constexpr int kMinRowsPerSplit = 64;
inline constexpr int kMaxSplits = 32;

constexpr int gather_num_splits(int64_t num_pairs, int top_k) {
  if (num_pairs <= 0) return 1;
  const int64_t wanted = kTargetBlocks / num_pairs;
  const int64_t useful = (top_k + kMinRowsPerSplit - 1) / kMinRowsPerSplit;
  const int64_t splits = wanted < useful ? wanted : useful;
  return static_cast<int>(splits < 1 ? 1 : (splits < kMaxSplits ? splits : kMaxSplits));
}

void gather_attention_cpu(const GatherAttentionParams& params);
void gather_attention_cuda(const GatherAttentionParams& params, CudaStream stream);

}  // namespace hata
