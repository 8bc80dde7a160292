#include "gather_attention.h"

#include <algorithm>

#include "cpu/attention_state.h"
#include "cpu/parallel.h"

namespace hata {

void gather_attention_cpu(const GatherAttentionParams& p) {
  const int group = group_of(p);
  const int64_t num_lists = int64_t{p.table.batch} * p.q_len * p.cache.num_kv_heads;
  const int per_split = (p.top_k + p.num_splits - 1) / p.num_splits;

  parallel_for(num_lists * p.num_splits, 1, [&](int64_t begin, int64_t end) {
    AttentionState state(p, group);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t list = item / p.num_splits;
      const int64_t token = list / p.cache.num_kv_heads;
      const int split = static_cast<int>(item % p.num_splits);
      const int kv_head_idx = static_cast<int>(list % p.cache.num_kv_heads);
      const int b = static_cast<int>(token / p.q_len), j = static_cast<int>(token % p.q_len);
      const int visible = visible_len(seq_len_of(p.table, b), p.q_len, j);
      const int32_t* indices = p.indices + list * p.top_k;
      const int last = std::min((split + 1) * per_split, p.top_k);
      state.reset(b, j, kv_head_idx);
      for (int i = split * per_split; i < last;) {
        RowTile tile;
        for (; i < last && tile.n < kTile; ++i) {
          const int t = indices[i];
          if (t >= 0 && t < visible) tile.add(p, b, kv_head_idx, t);
        }
        state.add(tile, [&](int) { return tile.n; });
      }
      p.num_splits == 1 ? state.store() : state.store_part(split);
    }
  });
  if (p.num_splits == 1) return;
  parallel_for(num_queries_of(p), 16,
               [&](int64_t begin, int64_t end) { merge_parts(p, p.num_splits, begin, end); });
}

}  // namespace hata
