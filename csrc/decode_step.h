#pragma once

#include "cache_append.h"
#include "encode_query.h"
#include "gather_attention.h"
#include "score_select.h"

namespace hata {

// One decoding step of one layer: append the new tokens, encode their queries, score every cached
// code, select, attend. Each part's params point at the buffers of the one before it.
//
// On CUDA hash weights may be read before the kernel before the step in the stream has ended, if
// that kernel lets the next one launch early (programmatic dependent launch): it must not be the
// one that writes them.
struct DecodeStepParams {
  CacheAppendParams append;
  EncodeQueryParams encode;
  ScoreSelectParams select;
  GatherAttentionParams attend;
};

void decode_step_cpu(const DecodeStepParams& params);
void decode_step_cuda(const DecodeStepParams& params, CudaStream stream);

}  // namespace hata
