#pragma once

#include <cstdint>

#include "hash_code.h"

// The caches of one layer. Position t of sequence b lies in page block_table[b, t / page_size] at
// row t % page_size. A contiguous cache is one page per sequence. Strides are in elements.
namespace hata {

struct PageTable {
  int batch, max_pages, num_pages;
  // t >> shift is the page of position t in its sequence, t & mask its row. With one page per
  // sequence (any page_size): shift 31, mask 2^31 - 1.
  int page_shift;
  int page_mask;
  int capacity;                // max_pages * page_size: positions that a sequence can have
  const int32_t* block_table;  // [batch, max_pages], rows block_table_stride apart
  const int32_t*
      cache_seqlens;  // [batch]: positions in use, the q_len tokens of this call included
  int64_t block_table_stride;
};

inline constexpr int kMaxHeadDim = 512;

// Rows in float8 (e4m3, without infinities) hold what k and v are divided by their KV head's scale.
struct KvCache {
  DType dtype;
  int num_kv_heads, head_dim;
  void* k;  // [num_pages, page_size, num_kv_heads, head_dim], last dimension contiguous
  void* v;  // the same shape
  int64_t k_page_stride, k_token_stride, k_head_stride;
  int64_t v_page_stride, v_token_stride, v_head_stride;
  // Of float8 rows, those of KV heads scale_stride apart: 0 where all have the same. Null: 1.
  const float* k_scale;
  const float* v_scale;
  int64_t k_scale_stride, v_scale_stride;
};

// What a float8 row is multiplied with to be a key or a value of this KV head.
constexpr float k_scale_of(const KvCache& cache, int kv_head_idx) {
  return cache.k_scale == nullptr ? 1.0f : cache.k_scale[kv_head_idx * cache.k_scale_stride];
}
constexpr float v_scale_of(const KvCache& cache, int kv_head_idx) {
  return cache.v_scale == nullptr ? 1.0f : cache.v_scale[kv_head_idx * cache.v_scale_stride];
}

struct CodeCache {
  int num_words;
  uint32_t*
      codes;  // [num_pages, num_kv_heads, page_size, num_words], last two dimensions contiguous
  uint16_t*
      norms;  // [num_pages, num_kv_heads, page_size] float16 bits, last one contiguous; or null
  int64_t code_page_stride, code_head_stride;
  int64_t norm_page_stride, norm_head_stride;
};

// The page that holds position t, or -1 where the table names a page that does not exist.
constexpr int page_of(const PageTable& table, int batch_idx, int t) {
  const int page =
      table.block_table[batch_idx * table.block_table_stride + (t >> table.page_shift)];
  return page >= 0 && page < table.num_pages ? page : -1;
}

// The page that holds every position of a sequence in a contiguous cache, or -1 as page_of(); it is
// looked up once. Always -1 in other caches.
constexpr int only_page(const PageTable& table, int batch_idx) {
  return table.max_pages == 1 ? page_of(table, batch_idx, 0) : -1;
}

constexpr int row_of(const PageTable& table, int t) {
  return t & table.page_mask;
}

// Positions in use, never more than the cache can hold.
constexpr int seq_len_of(const PageTable& table, int batch_idx) {
  const int seq_len = table.cache_seqlens[batch_idx];
  return seq_len < 0 ? 0 : (seq_len < table.capacity ? seq_len : table.capacity);
}

// Query token j of q_len sees positions below this. Negative for padding before a short sequence's
// first token: it sees nothing.
constexpr int visible_len(int seq_len, int q_len, int j) {
  const int visible = seq_len - q_len + j + 1;
  return visible < 0 ? 0 : visible;
}

}  // namespace hata
