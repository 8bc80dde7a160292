#pragma once

#include "paged_cache.h"

namespace hata {

// select_topk of hamming_score, without the public score tensor.
struct ScoreSelectParams {
  PageTable table;
  CodeCache code_cache;
  int q_len, num_kv_heads;
  int weight_sum;
  int top_k, num_sink, num_recent;

  const uint32_t* planes;  // [batch, q_len, num_kv_heads, num_planes, num_words], contiguous
  int32_t* indices;        // [batch, q_len, num_kv_heads, top_k], contiguous
  int32_t* num_selected;   // [batch, q_len, num_kv_heads], contiguous
  uint16_t* keys;          // workspace [batch, q_len, num_kv_heads, table.capacity]
};

void score_select_cpu(const ScoreSelectParams& params);
void score_select_cuda(const ScoreSelectParams& params, CudaStream stream);

}  // namespace hata
