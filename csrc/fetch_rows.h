#pragma once

#include "paged_cache.h"

namespace hata {

// The row cache of one layer: for each sequence and KV head num_slots rows of keys and values,
// copies of rows of a KvCache that lies in memory that is slow to read.
struct RowCache {
  int num_slots;
  void* k;  // [batch, num_slots, num_kv_heads, head_dim], last dimension contiguous
  void* v;  // the same shape
  int64_t k_batch_stride, k_slot_stride, k_head_stride;
  int64_t v_batch_stride, v_slot_stride, v_head_stride;
  // [num_pages, num_kv_heads, page_size], contiguous: where a row of the cache may be; a hint,
  // which position_of_slot confirms.
  int32_t* slot_of_row;
  int32_t* position_of_slot;  // [batch, num_kv_heads, num_slots], contiguous; -1: nothing
  uint8_t* referenced;        // the same shape: used since the hand last passed
  int32_t* hand;              // [batch, num_kv_heads], contiguous: the next slot to look at
};

// For each sequence and KV head, brings the rows of the positions in indices[b, 0, h] into the row
// cache and says in which slot each is: -1 for a position that is below 0 or not below the
// sequence's length, or whose page does not exist. Rows that are cached stay where they are. Each
// other one, in the order of the indices, takes the slot that a clock gives up (Corbato, A paging
// experiment with the Multics system, 1968): a hand goes round the slots; it passes those that this
// call uses; it passes those that have been used since it last came by, and clears their mark; and
// it gives up the first other one. With num_slots >= top_k there always is one.
struct FetchRowsParams {
  PageTable table;
  KvCache cache;
  RowCache rows;
  int page_size;
  int element_bytes;  // of the caches' dtype, and all that matters of it
  int top_k;
  const int32_t* indices;  // [batch, 1, num_kv_heads, top_k], contiguous; each position once
  int32_t* slots;          // the same shape
  // The same shape: which of a list's indices were not cached, num_missing of them, then -1.
  int32_t* missing;
  int32_t* num_missing;  // [batch, num_kv_heads], contiguous
};

// Where a row stands in slot_of_row.
constexpr int64_t hint_offset(const FetchRowsParams& p, int page, int row, int kv_head_idx) {
  return (int64_t{page} * p.cache.num_kv_heads + kv_head_idx) * p.page_size + row;
}

void fetch_rows_cpu(const FetchRowsParams& params);
void fetch_rows_cuda(const FetchRowsParams& params, CudaStream stream);

}  // namespace hata
