#pragma once

#include "cache_append.h"

// Finds the key, value, code and norm of a row of the caches.
namespace hata {

// Rows of K and V of Element.
template <typename Element>
__device__ __forceinline__ Element* key_at(const KvCache& cache, const Slot& slot,
                                           int kv_head_idx) {
  return static_cast<Element*>(cache.k) + slot.page * cache.k_page_stride +
         slot.row * cache.k_token_stride + kv_head_idx * cache.k_head_stride;
}
template <typename Element>
__device__ __forceinline__ Element* value_at(const KvCache& cache, const Slot& slot,
                                             int kv_head_idx) {
  return static_cast<Element*>(cache.v) + slot.page * cache.v_page_stride +
         slot.row * cache.v_token_stride + kv_head_idx * cache.v_head_stride;
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
