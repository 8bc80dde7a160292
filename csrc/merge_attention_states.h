#pragma once

#include "hash_code.h"

namespace hata {

// The attention over two disjoint sets of keys from the attention over each:
//   lse = ln(exp(lse_a) + exp(lse_b)),  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b.
// Two empty states (lse = -infinity) give out = 0 and lse = -infinity.
struct MergeAttentionStatesParams {
  DType dtype;  // of the three outs
  int64_t num_rows;
  int head_dim;

  const void* out_a;   // [num_rows, head_dim], contiguous, like everything here
  const float* lse_a;  // [num_rows], natural log
  const void* out_b;
  const float* lse_b;
  void* out;
  float* lse;
};

void merge_attention_states_cpu(const MergeAttentionStatesParams& params);
void merge_attention_states_cuda(const MergeAttentionStatesParams& params, CudaStream stream);

}  // namespace hata
