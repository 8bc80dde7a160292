#pragma once

#include "cpu/hot_loops.h"

namespace hata {

// The selection of one row (select_topk.h): the positions of the top_k highest of `visible` keys,
// ascending, then -1; their number is returned. Key is uint16_t or uint32_t.
template <class Key>
int select_row(const KeyLoops<Key>& loops, const Key* keys, int visible, int top_k, int num_sink,
               int num_recent, int32_t* indices);

}  // namespace hata
