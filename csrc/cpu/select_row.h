#pragma once

#include "cpu/hot_loops.h"

namespace hata {

// The selection of one row (select_topk.h): the positions of the top_k highest of `visible` ranks,
// ascending, then -1; their number is returned. Rank is uint16_t or uint32_t.
template <class Rank>
int select_row(const RankLoops<Rank>& loops, const Rank* ranks, int visible, int top_k,
               int num_sink, int num_recent, int32_t* indices);

}  // namespace hata
