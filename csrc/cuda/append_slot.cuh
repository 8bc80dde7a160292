#pragma once

#include "cache_append.h"

// Finds the key, value, code and norm of a row of the caches.
namespace hata {

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
