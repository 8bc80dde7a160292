#include "gather_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/hot_loops.h"
#include "cpu/parallel.h"

namespace hata {
namespace {

constexpr int kTile = 64;  // rows whose logits are computed before their values are summed
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// One query token and KV head.
struct Pair {
  int64_t b, j, h;
  int visible;
  const int32_t* indices;  // [top_k]
};

Pair pair_at(const GatherAttentionParams& p, int64_t pair) {
  const int64_t token = pair / p.cache.num_kv_heads;
  const int64_t b = token / p.q_len, j = token % p.q_len;
  const int seq_len = seq_len_of(p.table, static_cast<int>(b));
  return {b, j, pair % p.cache.num_kv_heads, visible_len(seq_len, p.q_len, static_cast<int>(j)),
          p.indices + pair * p.top_k};
}

// The running softmax of a group of query heads over the rows seen so far.
class AttentionState {
 public:
  AttentionState(const HotLoops& loops, const GatherAttentionParams& params)
      : loops_(loops),
        p_(params),
        group_(params.num_heads / params.cache.num_kv_heads),
        q_(static_cast<size_t>(group_) * params.cache.head_dim),
        acc_(q_),
        weights_(static_cast<size_t>(group_) * kTile),
        largest_(static_cast<size_t>(group_)),
        sum_(largest_) {}

  // Starts anew with the queries of a pair.
  void reset(const Pair& pair) {
    const int head_dim = p_.cache.head_dim;
    for (int g = 0; g < group_; ++g) {
      const int64_t offset = pair.b * p_.q_batch_stride + pair.j * p_.q_token_stride +
                             (pair.h * group_ + g) * p_.q_head_stride;
      loops_.to_float(element(p_.q, p_.cache.dtype, offset), p_.cache.dtype, head_dim,
                      q_.data() + static_cast<int64_t>(g) * head_dim);
    }
    std::fill(acc_.begin(), acc_.end(), 0.0f);
    std::fill(largest_.begin(), largest_.end(), kMinusInfinity);
    std::fill(sum_.begin(), sum_.end(), 0.0f);
  }

  // Adds the rows that indices [begin, end) of the pair name.
  void add(const Pair& pair, int begin, int end) {
    const void* k_rows[kTile];
    const void* v_rows[kTile];
    const KvCache& cache = p_.cache;
    for (int i = begin; i < end;) {
      int n = 0;
      for (; i < end && n < kTile; ++i) {
        const int t = pair.indices[i];
        if (t < 0 || t >= pair.visible) continue;
        const int64_t page = page_of(p_.table, static_cast<int>(pair.b), t);
        if (page < 0) continue;
        const int64_t row = row_of(p_.table, t);
        k_rows[n] = element(
            cache.k, cache.dtype,
            page * cache.k_page_stride + row * cache.k_token_stride + pair.h * cache.k_head_stride);
        v_rows[n++] = element(
            cache.v, cache.dtype,
            page * cache.v_page_stride + row * cache.v_token_stride + pair.h * cache.v_head_stride);
      }
      if (n > 0) add_rows(k_rows, v_rows, n);
    }
  }

  float lse(int g) const {
    return sum_[g] == 0.0f ? kMinusInfinity : largest_[g] + std::log(sum_[g]);
  }

  // The normalized output of query head g of the group, [head_dim].
  const float* out(int g) {
    float* row = acc_.data() + static_cast<int64_t>(g) * p_.cache.head_dim;
    if (sum_[g] != 0.0f) {
      for (int d = 0; d < p_.cache.head_dim; ++d) row[d] /= sum_[g];
    }
    return row;
  }

 private:
  void add_rows(const void* const* k_rows, const void* const* v_rows, int n) {
    const int head_dim = p_.cache.head_dim;
    loops_.dot_rows(q_.data(), group_, head_dim, k_rows, v_rows, n, p_.cache.dtype, weights_.data(),
                    kTile);
    for (int g = 0; g < group_; ++g) {
      float* weights = weights_.data() + static_cast<int64_t>(g) * kTile;
      float largest = largest_[g];
      for (int r = 0; r < n; ++r) {
        weights[r] *= p_.softmax_scale;
        largest = std::max(largest, weights[r]);
      }
      const float rescale = largest_[g] == largest ? 1.0f : std::exp(largest_[g] - largest);
      float sum = 0.0f;
      for (int r = 0; r < n; ++r) {
        weights[r] = std::exp(weights[r] - largest);
        sum += weights[r];
      }
      float* acc = acc_.data() + static_cast<int64_t>(g) * head_dim;
      for (int d = 0; d < head_dim; ++d) acc[d] *= rescale;
      sum_[g] = sum_[g] * rescale + sum;
      largest_[g] = largest;
    }
    loops_.add_weighted_rows(weights_.data(), kTile, group_, head_dim, v_rows, n, p_.cache.dtype,
                             acc_.data());
  }

  const HotLoops& loops_;
  const GatherAttentionParams& p_;
  int group_;
  std::vector<float> q_, acc_;        // [group, head_dim]
  std::vector<float> weights_;        // [group, kTile]: logits, then exp(logit - largest)
  std::vector<float> largest_, sum_;  // [group]
};

// Joins the num_splits partial results of one row, one query token and query head.
void merge_splits(const GatherAttentionParams& p, int64_t num_rows, int64_t row, float* sum) {
  const int head_dim = p.cache.head_dim;
  float largest = kMinusInfinity;
  for (int s = 0; s < p.num_splits; ++s) {
    largest = std::max(largest, p.lse_partial[s * num_rows + row]);
  }
  std::fill(sum, sum + head_dim, 0.0f);
  float total = 0.0f;
  for (int s = 0; s < p.num_splits; ++s) {
    const float lse = p.lse_partial[s * num_rows + row];
    if (lse == kMinusInfinity) continue;
    const float weight = std::exp(lse - largest);
    const float* out = p.out_partial + (s * num_rows + row) * head_dim;
    for (int d = 0; d < head_dim; ++d) sum[d] += weight * out[d];
    total += weight;
  }
  if (total != 0.0f) {
    for (int d = 0; d < head_dim; ++d) sum[d] /= total;
  }
  p.lse[row] = total == 0.0f ? kMinusInfinity : largest + std::log(total);
  store_floats(sum, head_dim, p.cache.dtype, element(p.out, p.cache.dtype, row * head_dim));
}

}  // namespace

void gather_attention_cpu(const GatherAttentionParams& p) {
  const HotLoops& loops = hot_loops();
  const DType dtype = p.cache.dtype;
  const int head_dim = p.cache.head_dim;
  const int group = p.num_heads / p.cache.num_kv_heads;
  const int64_t num_pairs = static_cast<int64_t>(p.table.batch) * p.q_len * p.cache.num_kv_heads;
  const int64_t num_rows = num_pairs * group;
  const int per_split = (p.top_k + p.num_splits - 1) / p.num_splits;

  parallel_for(num_pairs * p.num_splits, 1, [&](int64_t begin, int64_t end) {
    AttentionState state(loops, p);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t pair_idx = item / p.num_splits, split = item % p.num_splits;
      const Pair pair = pair_at(p, pair_idx);
      const int first = static_cast<int>(split) * per_split;
      state.reset(pair);
      state.add(pair, std::min(first, p.top_k), std::min(first + per_split, p.top_k));
      for (int g = 0; g < group; ++g) {
        const int64_t row = pair_idx * group + g;
        if (p.num_splits == 1) {
          store_floats(state.out(g), head_dim, dtype, element(p.out, dtype, row * head_dim));
          p.lse[row] = state.lse(g);
        } else {
          std::copy_n(state.out(g), head_dim, p.out_partial + (split * num_rows + row) * head_dim);
          p.lse_partial[split * num_rows + row] = state.lse(g);
        }
      }
    }
  });
  if (p.num_splits == 1) return;
  parallel_for(num_rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(static_cast<size_t>(head_dim));
    for (int64_t row = begin; row < end; ++row) merge_splits(p, num_rows, row, sum.data());
  });
}

}  // namespace hata
