#pragma once

#include "paged_cache.h"

namespace hata {

// Writes token j of q_len to position cache_seqlens[b] - q_len + j of sequence b: its k, its v, its
// code and its norm (hash_encode.h). Tokens with a negative position (left padding), those before
// the last new_seqlens[b], and those past the cache's capacity are not written.
struct CacheAppendParams {
  PageTable table;
  KvCache cache;
  CodeCache code_cache;
  int q_len;
  const int32_t* new_seqlens;  // [batch], or null: all q_len tokens are new

  const void* k;            // [batch, q_len, num_kv_heads, head_dim], last dimension contiguous
  const void* v;            // the same shape
  const void* key_weights;  // [num_kv_heads, head_dim, num_bits], contiguous

  int64_t k_batch_stride, k_token_stride, k_head_stride;
  int64_t v_batch_stride, v_token_stride, v_head_stride;
};

// The position of token j of sequence b, or -1 if it is not to be written.
constexpr int append_position(const PageTable& table, const int32_t* new_seqlens, int q_len,
                              int batch_idx, int j) {
  if (new_seqlens != nullptr && j < q_len - new_seqlens[batch_idx]) return -1;
  const int position = table.cache_seqlens[batch_idx] - q_len + j;
  return position >= 0 && position < table.capacity ? position : -1;
}

void cache_append_cpu(const CacheAppendParams& params);
void cache_append_cuda(const CacheAppendParams& params, CudaStream stream);

}  // namespace hata
