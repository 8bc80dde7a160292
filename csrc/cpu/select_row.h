#pragma once

#include "cpu/hot_loops.h"

namespace hata {

// How the selection of one row ended: selected are the positions of ranks above last_rank, and of
// the num_ties that have this rank all but the first num_skipped. Without ties none of the
// positions that compete is selected, or all are.
template <class Rank>
struct RowCut {
  Rank last_rank = 0;
  int num_ties = 0, num_skipped = 0;
};

// The selection of one row (select_topk.h): the positions of the top_k highest of `visible` ranks,
// ascending, then -1. Rank is uint16_t or uint32_t.
template <class Rank>
RowCut<Rank> select_row(const RankLoops<Rank>& loops, const Rank* ranks, int visible, int top_k,
                        int num_sink, int num_recent, int32_t* indices);

}  // namespace hata
