#include "select_topk.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/select_row.h"
#include "paged_cache.h"
#include "query_planes.h"
#include "selection.h"

namespace hata {
namespace {

// One list to select from: its number, and where in p.scores it begins.
struct List {
  int64_t idx, offset;
  int visible, budget;
  int32_t* indices;
};

// Selects from ranks, and says in terms of scores how that ended.
template <class Rank, class ScoreOf>
void select_ranks(const SelectTopkParams& p, const RankLoops<Rank>& loops, const Rank* ranks,
                  const List& list, const ScoreOf& score_of) {
  const RowCut<Rank> cut =
      select_row(loops, ranks, list.visible, list.budget, p.num_sink, p.num_recent, list.indices);
  p.cut.write(list.idx, score_of(cut.last_rank), cut.num_ties);
}

// Selects from scores, whose bits kRankOf maps to ranks, and kScoreOf back.
template <auto kRankOf, auto kScoreOf, class Rank>
void select_scores(const SelectTopkParams& p, const RankLoops<Rank>& loops, const List& list) {
  using Bits = decltype(kScoreOf(Rank{}));
  const auto* const scores = static_cast<const Bits*>(p.scores) + list.offset;
  thread_local std::vector<Rank> ranks;
  ranks.resize(static_cast<size_t>(list.visible));
  for (int t = 0; t < list.visible; ++t) ranks[t] = kRankOf(scores[t]);
  select_ranks(p, loops, ranks.data(), list, kScoreOf);
}

void select_one(const SelectTopkParams& p, const HotLoops& loops, const List& list) {
  const auto ranks = [&] { return static_cast<const uint16_t*>(p.scores) + list.offset; };
  switch (p.dtype) {
    case SelectDType::kInt32:
      return select_scores<ordered_rank_int32, int32_of_rank>(p, loops.ranks32, list);
    case SelectDType::kFloat32:
      return select_scores<ordered_rank_float32, float32_of_rank>(p, loops.ranks32, list);
    case SelectDType::kFloat16:
      return select_scores<ordered_rank_float16, float16_of_rank>(p, loops.ranks16, list);
    case SelectDType::kRankFloat16:
      return select_ranks(p, loops.ranks16, ranks(), list, float16_of_rank);
    case SelectDType::kMatches:
      return select_ranks(p, loops.ranks16, ranks(), list, [&](uint16_t matches) {
        return score_of_matches(matches, p.max_matches);
      });
  }
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
      select_one(p, loops, {row, offset, visible, budget, indices});
      p.num_selected[row] = std::min(visible, budget);
      std::fill(indices + budget, indices + p.top_k, -1);
    }
  });
}

}  // namespace hata
