#pragma once

#include "paged_cache.h"

namespace hata {

// What a scan writes for each visible position.
enum class ScoreKind {
  kInt32,    // the score, 2 matches - weight_sum num_bits
  kFloat16,  // score / num_bits * norm, in float32, rounded once
  kRank16,   // the matches themselves, or ordered_rank_float16 of the float16 score: internal
};

// scores[b, j, h, t] = sum_p w_p (num_bits - 2 popcount(code[b, h, t] ^ planes[b, j, h, p]))
// for every position t that query token j sees; see query_planes.h for the weights w_p.
// Positions that it does not see get the lowest value: INT32_MIN, -infinity; those of kRank16
// are undefined.
struct HammingScoreParams {
  PageTable table;
  CodeCache code_cache;  // norms non-null exactly where the float16 score is wanted
  ScoreKind kind;
  int q_len, num_kv_heads;
  int weight_sum;
  int max_seq_len;  // width of scores

  const uint32_t* planes;  // [batch, q_len, num_kv_heads, num_planes, num_words], contiguous
  void* scores;            // [batch, q_len, num_kv_heads, max_seq_len], contiguous
};

void hamming_score_cpu(const HammingScoreParams& params);
void hamming_score_cuda(const HammingScoreParams& params, CudaStream stream);

}  // namespace hata
