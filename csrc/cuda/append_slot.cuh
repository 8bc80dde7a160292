#pragma once

#include "cache_append.h"

// Where a new token's key, value, code and norm go.
namespace hata {

// A row of a page; row is -1 where the token is not written.
struct Slot {
  int page;
  int row;
};

// Without a block table (hash_encode) token j of sequence b is row j of page b.
__device__ __forceinline__ Slot slot_of(const CacheAppendParams& p, int batch_idx, int token_idx) {
  if (token_idx >= p.q_len) return {0, -1};
  if (p.table.block_table == nullptr) return {batch_idx, token_idx};
  const int position = append_position(p.table, p.new_seqlens, p.q_len, batch_idx, token_idx);
  if (position < 0) return {0, -1};
  const int page = page_of(p.table, batch_idx, position);
  return {page, page < 0 ? -1 : row_of(p.table, position)};
}

template <typename T>
__device__ __forceinline__ T* cache_row(void* cache, int64_t page_stride, int64_t token_stride,
                                        int64_t head_stride, const Slot& slot, int kv_head_idx) {
  return static_cast<T*>(cache) + slot.page * page_stride + slot.row * token_stride +
         kv_head_idx * head_stride;
}

__device__ __forceinline__ uint32_t* code_at(const CodeCache& cache, const Slot& slot,
                                             int kv_head_idx) {
  return cache.codes + slot.page * cache.code_page_stride + kv_head_idx * cache.code_head_stride +
         int64_t{slot.row} * cache.num_words;
}

__device__ __forceinline__ uint16_t* norm_at(const CodeCache& cache, const Slot& slot,
                                             int kv_head_idx) {
  return cache.norms + slot.page * cache.norm_page_stride + kv_head_idx * cache.norm_head_stride +
         slot.row;
}

}  // namespace hata
