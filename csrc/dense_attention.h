#pragma once

#include "attention.h"

namespace hata {

// For query token j of sequence b and each query head:
//   out = sum_t softmax_t(logit_t) v_t over all positions t < visible_len(b, j),
//   lse = ln sum_t exp(logit_t), softmax in float32, logits as in attention.h.
// Where token j sees none, out = 0 and lse = -infinity. Nothing is written for sequences of
// min_sparse_len positions or more. The launch follows from the shapes alone, never from a length.
struct DenseAttentionParams : AttentionParams {
  int min_sparse_len;
};

// One list of positions serves all rows of a KV head, kMaxColumns at a time.
inline constexpr int kMaxColumns = 16;

constexpr int dense_num_splits(const AttentionParams& p) {
  const int64_t columns = int64_t{p.q_len} * group_of(p);
  const int64_t lists =
      int64_t{p.table.batch} * p.cache.num_kv_heads * ((columns + kMaxColumns - 1) / kMaxColumns);
  return attention_num_splits(lists, p.table.capacity);
}

// How the splits share a sequence, whose length only the device knows: each takes `pieces` pieces
// of kMinRowsPerSplit positions, and `used` of them, at least one, have any. What they take does
// not depend on the capacity.
struct SequenceSplits {
  int pieces, used;
};

constexpr SequenceSplits split_sequence(int seq_len, int num_splits) {
  if (seq_len <= 0) return {0, 1};
  const int num_pieces = (seq_len - 1) / kMinRowsPerSplit + 1;
  const int pieces = (num_pieces - 1) / num_splits + 1;
  return {pieces, (num_pieces - 1) / pieces + 1};
}

void dense_attention_cpu(const DenseAttentionParams& params);
void dense_attention_cuda(const DenseAttentionParams& params, CudaStream stream);

}  // namespace hata
