#include "select_topk.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/select_row.h"
#include "paged_cache.h"
#include "selection.h"

namespace hata {
namespace {

// Selects `budget` positions from scores that order_rank maps to ranks.
template <class Rank, class Score, class OrderRank>
int select_scores(const SelectTopkParams& p, const RankLoops<Rank>& loops, const Score* scores,
                  int visible, int budget, int32_t* indices, const OrderRank& order_rank) {
  thread_local std::vector<Rank> ranks;
  ranks.resize(static_cast<size_t>(visible));
  for (int t = 0; t < visible; ++t) ranks[t] = order_rank(scores[t]);
  return select_row(loops, ranks.data(), visible, budget, p.num_sink, p.num_recent, indices);
}

int select_one(const SelectTopkParams& p, const HotLoops& loops, int64_t offset, int visible,
               int budget, int32_t* indices) {
  switch (p.dtype) {
    case SelectDType::kInt32:
      return select_scores(p, loops.ranks32, static_cast<const int32_t*>(p.scores) + offset,
                           visible, budget, indices, ordered_rank_int32);
    case SelectDType::kFloat32:
      return select_scores(
          p, loops.ranks32, static_cast<const float*>(p.scores) + offset, visible, budget, indices,
          [](float score) { return ordered_rank_float32(std::bit_cast<uint32_t>(score)); });
    case SelectDType::kFloat16:
      return select_scores(p, loops.ranks16, static_cast<const uint16_t*>(p.scores) + offset,
                           visible, budget, indices, ordered_rank_float16);
    case SelectDType::kRank16:
      break;
  }
  return select_row(loops.ranks16, static_cast<const uint16_t*>(p.scores) + offset, visible, budget,
                    p.num_sink, p.num_recent, indices);
}

}  // namespace

void select_topk_cpu(const SelectTopkParams& p) {
  const HotLoops& loops = hot_loops();
  const int64_t rows = static_cast<int64_t>(p.batch) * p.q_len * p.num_kv_heads;
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h = row % p.num_kv_heads;
      const int64_t token = row / p.num_kv_heads;
      const int64_t b = token / p.q_len, j = token % p.q_len;
      const int seq_len = std::clamp(p.cache_seqlens[b], 0, p.max_seq_len);
      const int visible = visible_len(seq_len, p.q_len, static_cast<int>(j));
      const int64_t offset =
          b * p.score_batch_stride + j * p.score_token_stride + h * p.score_head_stride;
      const int budget = budget_of(visible, p.top_k, p.min_top_k, p.top_k_share);
      int32_t* indices = p.indices + row * p.top_k;
      p.num_selected[row] = select_one(p, loops, offset, visible, budget, indices);
      std::fill(indices + budget, indices + p.top_k, -1);
    }
  });
}

}  // namespace hata
