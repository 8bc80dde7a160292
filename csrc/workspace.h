#pragma once

#include <cstdint>

#include "attention.h"
#include "query_planes.h"
#include "score_select.h"

// The scratch memory of one decoding step, as byte offsets into one buffer.
namespace hata {

inline constexpr int64_t kWorkspaceAlignment = 256;

constexpr int64_t align_workspace(int64_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

struct WorkspaceLayout {
  int64_t planes;       // [batch, q_len, num_kv_heads, kMaxPlanes, kMaxWords] uint32
  int64_t ranks;        // [batch, q_len, num_kv_heads], rank_list_bytes(max_seq_len) each
  int64_t exchange;     // kExchangeBytes bytes
  int64_t out_partial;  // [num_splits, batch, q_len, num_heads, head_dim] float32
  int64_t lse_partial;  // [num_splits, batch, q_len, num_heads] float32
  int64_t size;
};

constexpr WorkspaceLayout workspace_layout(int64_t batch, int64_t q_len, int64_t num_heads,
                                           int64_t num_kv_heads, int64_t head_dim,
                                           int64_t max_seq_len, int64_t top_k) {
  const int64_t pairs = batch * q_len * num_kv_heads;
  const int64_t rows = batch * q_len * num_heads;
  const int64_t splits = attention_num_splits(pairs, top_k);
  WorkspaceLayout layout{};
  layout.planes = 0;
  layout.ranks = layout.planes + align_workspace(pairs * kMaxPlanes * kMaxWords * 4);
  layout.exchange = layout.ranks + align_workspace(pairs * rank_list_bytes(max_seq_len));
  layout.out_partial = layout.exchange + align_workspace(kExchangeBytes);
  layout.lse_partial = layout.out_partial + align_workspace(splits * rows * head_dim * 4);
  layout.size = layout.lse_partial + align_workspace(splits * rows * 4);
  return layout;
}

}  // namespace hata
