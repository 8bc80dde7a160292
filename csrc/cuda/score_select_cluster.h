#pragma once

#include "score_select.h"

namespace hata {

// score_select by one kernel in which a cluster of blocks serves a KV head of a sequence. Returns
// false, having done nothing, where that is impossible: a GPU before sm_90 or more than
// kMaxClusterTokens query tokens.
inline constexpr int kMaxClusterTokens = 8;
bool score_select_cluster(const ScoreSelectParams& params, CudaStream stream);

}  // namespace hata
