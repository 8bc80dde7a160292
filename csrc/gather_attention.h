#pragma once

#include "attention.h"

namespace hata {

// For query token j of sequence b, query head i and the KV head h of its group:
//   out = sum_t softmax_t(logit_t) v_t over the positions t in indices[b, j, h],
//   lse = ln sum_t exp(logit_t), softmax in float32, logits as in attention.h.
// Indices may come in any order; those below 0 or not below what token j sees are skipped. Where
// none is left, out = 0 and lse = -infinity.
struct GatherAttentionParams : AttentionParams {
  int top_k;
  const int32_t* indices;  // [batch, q_len, num_kv_heads, top_k], contiguous
  bool may_use_clusters;   // sm_90: no workspace, and as many splits as fit in one cluster
  // q, cache_seqlens and block_table were complete before the kernel before this one in the stream
  // began; what it writes are indices and rows of the caches.
  bool queries_are_ready;
};

void gather_attention_cpu(const GatherAttentionParams& params);
void gather_attention_cuda(const GatherAttentionParams& params, CudaStream stream);

}  // namespace hata
