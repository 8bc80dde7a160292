#pragma once

#include "hamming_score.h"
#include "paged_cache.h"
#include "select_topk.h"

namespace hata {

// The ways to do it, with the same selection; the environment variable HATA_SCORE_SELECT forces one
// (auto, two_kernels, cluster, candidates, grid). two_kernels also keeps gather_attention from
// using clusters, so that it is what any GPU runs. With cluster decode_step attends in a second
// launch; with auto, candidates and grid, in the same one where it can.
enum class ScoreSelectAlgorithm {
  kAuto,
  kTwoKernels,  // any GPU: a scan that writes ranks to the workspace, then a selection from them
  kCluster,  // sm_90: one kernel, ranks and histograms in the shared memory of a cluster of blocks
  kCandidates,  // the same, and no slice's ranks are taken to fit, nor more candidates than a few
  kGrid,        // sm_90: as auto, and the blocks of the whole grid share the sequences' KV heads
                // wherever two blocks or more are left for each
};

// select_topk of hamming_score, without the public score tensor.
struct ScoreSelectParams {
  PageTable table;
  CodeCache code_cache;
  int q_len, num_kv_heads;
  int weight_sum;
  int top_k, min_top_k;
  uint32_t top_k_share;
  int num_sink, num_recent;

  const uint32_t* planes;  // [batch, q_len, num_kv_heads, num_planes, num_words], contiguous
  int32_t* indices;        // [batch, q_len, num_kv_heads, top_k], contiguous
  int32_t* num_selected;   // [batch, q_len, num_kv_heads], contiguous
  CutOutput cut;           // in float16 with norms, otherwise int32
  void* ranks;             // workspace [batch, q_len, num_kv_heads], rank_list_bytes each
  void* exchange;          // workspace, kExchangeBytes
  ScoreSelectAlgorithm algorithm;  // on CUDA

  constexpr int max_matches() const { return weight_sum * code_cache.num_words * kWordBits; }
};

// Ranks, 16-bit numbers with the order of the scores (ordered_rank_float16() or matches), are read
// 16 bytes at a time, so that a list of them is a multiple of that long.
constexpr int64_t rank_pitch(int64_t capacity) {
  return (capacity + 7) / 8 * 8;
}

// Candidates that a cluster's blocks cannot hold take 4 bytes; each block rounds its slice up to
// what a warp scores at a time.
constexpr int64_t candidate_pitch(int64_t capacity) {
  constexpr int kMostBlocks = 8, kMostPositions = 256;
  return capacity + kMostBlocks * kMostPositions;
}

// Bytes of the workspace for one (sequence, query token, KV head): candidates, or ranks, which are
// fewer bytes.
constexpr int64_t rank_list_bytes(int64_t capacity) {
  return candidate_pitch(capacity) * 4;
}

// Bytes of the workspace through which the blocks of a whole grid tell each other what the blocks
// of a cluster send each other, whatever the shape, so that the workspace of a large one serves all
// smaller ones. A multiprocessor has one of the blocks: an H100 132, a B200 148.
inline constexpr int kMaxGridBlocks = 160;
inline constexpr int64_t kExchangeBytesPerBlock = 34 * 1024;
inline constexpr int64_t kExchangeBytes = kMaxGridBlocks * kExchangeBytesPerBlock;
static_assert(kSelectWorkspaceBytes <= kExchangeBytes);

// The scan of score_select: ranks to the workspace.
constexpr HammingScoreParams rank_score_params(const ScoreSelectParams& p) {
  return {.table = p.table,
          .code_cache = p.code_cache,
          .kind = ScoreKind::kRank16,
          .q_len = p.q_len,
          .num_kv_heads = p.num_kv_heads,
          .weight_sum = p.weight_sum,
          .max_seq_len = static_cast<int>(rank_pitch(p.table.capacity)),
          .planes = p.planes,
          .scores = p.ranks};
}

// The selection of score_select: from the ranks in the workspace.
constexpr SelectTopkParams rank_select_params(const ScoreSelectParams& p) {
  const int64_t width = rank_pitch(p.table.capacity);
  const bool has_norms = p.code_cache.norms != nullptr;
  return {.dtype = has_norms ? SelectDType::kRankFloat16 : SelectDType::kMatches,
          .max_matches = p.max_matches(),
          .batch = p.table.batch,
          .q_len = p.q_len,
          .num_kv_heads = p.num_kv_heads,
          .max_seq_len = static_cast<int>(rank_pitch(p.table.capacity)),
          .top_k = p.top_k,
          .min_top_k = p.min_top_k,
          .top_k_share = p.top_k_share,
          .num_sink = p.num_sink,
          .num_recent = p.num_recent,
          .scores = p.ranks,
          .cache_seqlens = p.table.cache_seqlens,
          .indices = p.indices,
          .num_selected = p.num_selected,
          .cut = p.cut,
          .workspace = static_cast<SelectCounts*>(p.exchange),
          .score_batch_stride = p.q_len * p.num_kv_heads * width,
          .score_token_stride = p.num_kv_heads * width,
          .score_head_stride = width};
}

void score_select_cpu(const ScoreSelectParams& params);
void score_select_cuda(const ScoreSelectParams& params, CudaStream stream);

}  // namespace hata
