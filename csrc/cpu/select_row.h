#pragma once

#include <cstdint>

namespace hata {

// The selection of one row (select_topk.h): the positions of the top_k highest of `visible` keys,
// ascending, then -1; their number is returned. Key is uint16_t or uint32_t.
template <class Key>
int select_row(const Key* keys, int visible, int top_k, int num_sink, int num_recent,
               int32_t* indices);

extern template int select_row(const uint16_t*, int, int, int, int, int32_t*);
extern template int select_row(const uint32_t*, int, int, int, int, int32_t*);

}  // namespace hata
