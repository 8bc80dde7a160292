#include "dense_attention.h"

#include <algorithm>

#include "cpu/attention_state.h"
#include "cpu/parallel.h"

namespace hata {

void dense_attention_cpu(const DenseAttentionParams& p) {
  const int group = group_of(p);
  const int64_t num_lists = int64_t{p.table.batch} * p.cache.num_kv_heads;

  parallel_for(num_lists * p.num_splits, 1, [&](int64_t begin, int64_t end) {
    AttentionState state(p, p.q_len * group);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t list = item / p.num_splits;
      const int split = static_cast<int>(item % p.num_splits);
      const int kv_head_idx = static_cast<int>(list % p.cache.num_kv_heads);
      const int b = static_cast<int>(list / p.cache.num_kv_heads);
      const int seq_len = seq_len_of(p.table, b);
      const auto [pieces, used] = split_sequence(seq_len, p.num_splits);
      if (seq_len >= p.min_sparse_len || split >= used) continue;
      const int64_t share = int64_t{pieces} * kMinRowsPerSplit;
      const int last = static_cast<int>(std::min((split + 1) * share, int64_t{seq_len}));
      state.reset(b, 0, kv_head_idx);
      for (int t = static_cast<int>(split * share); t < last;) {
        const int first = t;
        RowTile tile;
        for (; t < last && tile.n < kTile; ++t) tile.add(p, b, kv_head_idx, t);
        state.add(tile, [&](int c) { return visible_len(seq_len, p.q_len, c / group) - first; });
      }
      used == 1 ? state.store() : state.store_part(split);
    }
  });
  const int64_t rows_per_sequence = int64_t{p.q_len} * p.num_heads;
  parallel_for(p.table.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int seq_len = seq_len_of(p.table, static_cast<int>(b));
      const int used = split_sequence(seq_len, p.num_splits).used;
      if (seq_len >= p.min_sparse_len || used == 1) continue;
      merge_parts(p, used, b * rows_per_sequence, (b + 1) * rows_per_sequence);
    }
  });
}

}  // namespace hata
