#pragma once

#include <optional>

#include "bindings/checks.h"
#include "cache_append.h"
#include "encode_query.h"
#include "gather_attention.h"
#include "score_select.h"

// Checked arguments -> params, for the ops that decode_step is made of. Each is defined with its
// op.
namespace hata {

CacheAppendParams cache_append_params(const ArgumentChecks& check, const Tensor& k, const Tensor& v,
                                      const std::optional<Tensor>& key_weights,
                                      const Tensor& k_cache, const Tensor& v_cache,
                                      const std::optional<Tensor>& code_cache,
                                      const std::optional<Tensor>& norm_cache,
                                      const Tensor& block_table, const Tensor& cache_seqlens,
                                      const std::optional<Tensor>& new_seqlens,
                                      const std::optional<Tensor>& k_scale,
                                      const std::optional<Tensor>& v_scale);

// `planes` is left null: the caller's output or workspace.
EncodeQueryParams encode_query_params(const ArgumentChecks& check, const Tensor& q,
                                      const Tensor& query_weights, int64_t query_bits);

// [num_kv_heads, head_dim, num_bits] weights in the dtype of the vectors that they project.
// Returns num_words.
int check_hash_weights(const ArgumentChecks& check, const Tensor& weights, const char* name,
                       DType dtype, int64_t num_kv_heads, int64_t head_dim);

struct Planes {
  int q_len, num_kv_heads;
  const uint32_t* data;
};

Planes check_planes(const ArgumentChecks& check, const Tensor& planes, int64_t batch,
                    const CodeCache& cache, int64_t num_kv_heads, int64_t weight_sum);

// What a selection from `capacity` positions comes to: indices are no wider than it.
struct Budget {
  int top_k, min_top_k;  // num_sink + num_recent <= min_top_k <= top_k <= capacity
  uint32_t top_k_share;  // budget_of() in selection.h
  int num_sink, num_recent;
};

// top_k >= 1, num_sink and num_recent >= 0, 0 < top_k_share < 1; num_sink + num_recent <= min_top_k
// <= top_k, where min_top_k comes with a share alone.
Budget checked_budget(const ArgumentChecks& check, int64_t top_k, int64_t num_sink,
                      int64_t num_recent, std::optional<double> top_k_share,
                      std::optional<int64_t> min_top_k, int64_t capacity);

// What select_topk and score_select return of how selections ended, empty if that is not asked for,
// and `params` to write it.
struct Cuts {
  Tensor last_score;  // [batch, q_len, num_kv_heads], of `dtype`
  Tensor num_ties;    // the same shape, int32
  CutOutput params;
};
Cuts allocate_cuts(const Tensor& like, int64_t batch, int64_t q_len, int64_t num_kv_heads,
                   ScalarType dtype, bool return_cut);

// What the environment variable HATA_SCORE_SELECT asks for.
ScoreSelectAlgorithm forced_algorithm(const ArgumentChecks& check);

// `planes`, `keys`, `indices` and `num_selected` are left null.
ScoreSelectParams score_select_params(const ArgumentChecks& check, const CodeCache& cache,
                                      const PageTable& table, int q_len, int num_kv_heads,
                                      int weight_sum, const Budget& budget);

// `out`, `lse` and the partials are left null, num_splits 1.
AttentionParams attention_params(const ArgumentChecks& check, const Tensor& q, const KvCache& cache,
                                 const PageTable& table, std::optional<double> softmax_scale,
                                 std::optional<double> softcap);

// The same with its splits; `indices` is left null.
GatherAttentionParams gather_attention_params(const ArgumentChecks& check, const Tensor& q,
                                              const KvCache& cache, const PageTable& table,
                                              int64_t top_k, std::optional<double> softmax_scale,
                                              std::optional<double> softcap);

}  // namespace hata
