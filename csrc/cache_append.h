#pragma once

#include "paged_cache.h"

namespace hata {

// Writes token j of q_len to position cache_seqlens[b] - q_len + j of sequence b: its k, its v, and
// where codes have words its code and norm (hash_encode.h). Tokens with a negative position (left
// padding), before the last new_seqlens[b], or past the cache's capacity are not written.
//
// cache_write is the same for a batch of one "sequence" whose tokens name their rows themselves:
// token j goes to row slot_mapping[j] % page_size of page slot_mapping[j] / page_size, and nowhere
// if that is negative. table.block_table is null then.
struct CacheAppendParams {
  PageTable table;
  KvCache cache;
  CodeCache code_cache;
  DType dtype;  // of k, v and key_weights: the cache's, unless that is float8
  int q_len;
  const int32_t* new_seqlens;   // [batch], or null: all q_len tokens are new
  const int64_t* slot_mapping;  // [q_len] of cache_write, else null

  const void* k;            // [batch, q_len, num_kv_heads, head_dim], last dimension contiguous
  const void* v;            // the same shape
  const void* key_weights;  // [num_kv_heads, head_dim, num_bits], contiguous; null without codes

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

// A row of a page; row is -1 where the token is not written.
struct Slot {
  int page;
  int row;
};

// Where token j of sequence b goes. With neither block table nor slots (hash_encode) that is row j
// of page b.
constexpr Slot slot_of(const CacheAppendParams& p, int batch_idx, int j) {
  if (j >= p.q_len) return {0, -1};
  if (p.table.block_table == nullptr) {
    if (p.slot_mapping == nullptr) return {batch_idx, j};
    const int64_t slot = p.slot_mapping[j];
    const int64_t page = slot >> p.table.page_shift;
    if (slot < 0 || page >= p.table.num_pages) return {0, -1};
    return {static_cast<int>(page), static_cast<int>(slot & p.table.page_mask)};
  }
  const int position = append_position(p.table, p.new_seqlens, p.q_len, batch_idx, j);
  if (position < 0) return {0, -1};
  const int page = page_of(p.table, batch_idx, position);
  return {page, page < 0 ? -1 : row_of(p.table, position)};
}

void cache_append_cpu(const CacheAppendParams& params);
void cache_append_cuda(const CacheAppendParams& params, CudaStream stream);

}  // namespace hata
