#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "cpu/hot_loops.h"

// How gather_attention and dense_attention attend on the CPU: each part of a list of rows by
// itself, then the parts of one query merged.
namespace hata {

inline constexpr int kTile = 64;  // rows whose logits are computed before their values are summed

// Keys and values of up to kTile positions of one KV head.
struct RowTile {
  const void* k_rows[kTile];
  const void* v_rows[kTile];
  int n = 0;

  // Adds position t, unless the page table has no page for it.
  void add(const AttentionParams& p, int b, int kv_head_idx, int t);
};

// The running softmaxes of `num_columns` queries of one KV head over the rows seen so far. Column c
// is query head c % group of the KV head's group, of query token first_token + c / group.
class AttentionState {
 public:
  AttentionState(const AttentionParams& params, int num_columns);

  // Starts anew with other queries.
  void reset(int b, int first_token, int kv_head_idx);

  // Adds the rows of a tile to every column; to column c only the first num_seen(c).
  template <class NumSeen>
  void add(const RowTile& tile, const NumSeen& num_seen) {
    if (tile.n == 0) return;
    loops_.dot_rows(q_.data(), num_columns_, p_.cache.head_dim, tile.k_rows, tile.v_rows, tile.n,
                    p_.cache.dtype, weights_.data(), kTile);
    for (int c = 0; c < num_columns_; ++c) weigh(c, tile.n, num_seen(c));
    loops_.add_weighted_rows(weights_.data(), kTile, num_columns_, p_.cache.head_dim, tile.v_rows,
                             tile.n, p_.cache.dtype, acc_.data());
  }

  // Writes out and lse, or those of one of several parts.
  void store();
  void store_part(int split);

 private:
  // Turns the logits of one column into weights, 0 from num_seen on.
  void weigh(int column, int n, int num_seen);
  int64_t query_of_column(int column) const;
  const float* normalized(int column);
  float lse(int column) const;

  const HotLoops& loops_;
  const AttentionParams& p_;
  int group_, num_columns_;
  int64_t b_ = 0, first_token_ = 0;
  int kv_head_idx_ = 0;
  float scale_ = 0;                   // of products with rows as they are
  std::vector<float> q_, acc_;        // [num_columns, head_dim]
  std::vector<float> weights_;        // [num_columns, kTile]: logits, then exp(logit - largest)
  std::vector<float> largest_, sum_;  // [num_columns]
};

// Merges the first num_parts partial results of queries [begin, end).
void merge_parts(const AttentionParams& p, int num_parts, int64_t begin, int64_t end);

}  // namespace hata
