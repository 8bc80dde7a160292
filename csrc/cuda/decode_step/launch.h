#pragma once

#include "decode_step.h"

namespace hata {

// score_select by the kernel of the fused step, in which a cluster of blocks serves a KV head of a
// sequence. Returns false, having done nothing, where that is impossible: a GPU before sm_90, more
// than step::kMaxTokens query tokens, or a longer cache than a list of candidates can tell
// positions of.
bool score_select_cluster(const ScoreSelectParams& params, CudaStream stream);

// All of a decoding step but the attention by the same kernel, which also encodes the queries and
// appends the new tokens. Also returns false where a new token may compete for selection
// (num_recent below q_len), because its code would have to be there before the scan, and where
// head_dim is above step::kMaxStepHeadDim.
bool encode_score_select_cluster(const DecodeStepParams& params, CudaStream stream);

// All of a decoding step in one kernel: each block also attends over what it selected. Further
// returns false where its registers and shared memory do not do (step::can_attend()), and where
// blocks of their own attend faster.
bool decode_step_cluster(const DecodeStepParams& params, CudaStream stream);

}  // namespace hata
