#pragma once

#include <cstdint>

#include "hash_code.h"
#include "selection.h"

namespace hata {

// What one block counts of its slice of a list: how many ranks have each value of a digit, and the
// sums of groups of 32 values.
struct SelectCounts {
  static constexpr int kGroups = 32, kBins = 1024;
  uint32_t groups[kGroups];
  uint32_t bins[kBins];
};

// Blocks that share lists, two a multiprocessor, and the workspace through which they tell each
// other their counts: two halves, because digits take turns in it.
inline constexpr int kMaxSelectBlocks = 384;
inline constexpr int64_t kSelectWorkspaceBytes = 2 * kMaxSelectBlocks * sizeof(SelectCounts);

// What is selected by: public scores, or the internal ranks of hamming_score.h, which are matches
// or have the order of float16 scores.
enum class SelectDType { kInt32, kFloat16, kFloat32, kMatches, kRankFloat16 };

// indices[b, j, h] = the `budget` visible positions with the highest scores, ascending, then -1;
// num_selected[b, j, h] = min(budget, visible), where budget = budget_of(visible, ...)
// (selection.h). The first num_sink and last num_recent visible positions are always among them
// (num_sink + num_recent <= min_top_k <= top_k); equal scores at the cut go to the most recent
// positions. `cut` says how that ended, in the dtype of the scores: int32 for matches.
struct SelectTopkParams {
  SelectDType dtype;
  int max_matches;  // where dtype is kMatches: of a position
  int batch, q_len, num_kv_heads;
  int max_seq_len;
  int top_k, min_top_k;
  uint32_t top_k_share;  // 0 without one, and min_top_k = top_k
  int num_sink, num_recent;

  const void* scores;            // [batch, q_len, num_kv_heads, max_seq_len], last one contiguous
  const int32_t* cache_seqlens;  // [batch]
  int32_t* indices;              // [batch, q_len, num_kv_heads, top_k], contiguous
  int32_t* num_selected;         // [batch, q_len, num_kv_heads], contiguous
  CutOutput cut;
  SelectCounts* workspace;  // kSelectWorkspaceBytes, on CUDA

  int64_t score_batch_stride, score_token_stride, score_head_stride;  // in elements
};

void select_topk_cpu(const SelectTopkParams& params);
void select_topk_cuda(const SelectTopkParams& params, CudaStream stream);

}  // namespace hata
