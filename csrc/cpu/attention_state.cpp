#include "cpu/attention_state.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dtype.h"

namespace hata {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

}  // namespace

void RowTile::add(const AttentionParams& p, int b, int kv_head_idx, int t) {
  const int64_t page = page_of(p.table, b, t), row = hata::row_of(p.table, t);
  if (page < 0) return;
  const KvCache& cache = p.cache;
  k_rows[n] = element(
      cache.k, cache.dtype,
      page * cache.k_page_stride + row * cache.k_token_stride + kv_head_idx * cache.k_head_stride);
  v_rows[n++] = element(
      cache.v, cache.dtype,
      page * cache.v_page_stride + row * cache.v_token_stride + kv_head_idx * cache.v_head_stride);
}

AttentionState::AttentionState(const AttentionParams& params, int num_columns)
    : loops_(hot_loops()),
      p_(params),
      group_(group_of(params)),
      num_columns_(num_columns),
      q_(static_cast<size_t>(num_columns) * params.cache.head_dim),
      acc_(q_),
      weights_(static_cast<size_t>(num_columns) * kTile),
      largest_(static_cast<size_t>(num_columns)),
      sum_(largest_) {}

void AttentionState::reset(int b, int first_token, int kv_head_idx) {
  b_ = b;
  first_token_ = first_token;
  kv_head_idx_ = kv_head_idx;
  const int head_dim = p_.cache.head_dim;
  for (int c = 0; c < num_columns_; ++c) {
    const int64_t offset = b_ * p_.q_batch_stride +
                           (first_token_ + c / group_) * p_.q_token_stride +
                           (kv_head_idx_ * group_ + c % group_) * p_.q_head_stride;
    loops_.to_float(element(p_.q, p_.dtype, offset), p_.dtype, head_dim,
                    q_.data() + static_cast<int64_t>(c) * head_dim);
  }
  scale_ = p_.softmax_scale * k_scale_of(p_.cache, kv_head_idx);
  std::fill(acc_.begin(), acc_.end(), 0.0f);
  std::fill(largest_.begin(), largest_.end(), kMinusInfinity);
  std::fill(sum_.begin(), sum_.end(), 0.0f);
}

void AttentionState::weigh(int column, int n, int num_seen) {
  float* weights = weights_.data() + static_cast<int64_t>(column) * kTile;
  std::fill(weights + std::clamp(num_seen, 0, n), weights + n, 0.0f);
  n = std::min(n, num_seen);
  if (n <= 0) return;
  float largest = largest_[column];
  for (int r = 0; r < n; ++r) {
    weights[r] *= scale_;
    if (p_.softcap != 0.0f) weights[r] = p_.softcap * std::tanh(weights[r] / p_.softcap);
    largest = std::max(largest, weights[r]);
  }
  const float rescale = largest_[column] == largest ? 1.0f : std::exp(largest_[column] - largest);
  float sum = 0.0f;
  for (int r = 0; r < n; ++r) {
    weights[r] = std::exp(weights[r] - largest);
    sum += weights[r];
  }
  float* acc = acc_.data() + static_cast<int64_t>(column) * p_.cache.head_dim;
  for (int d = 0; d < p_.cache.head_dim; ++d) acc[d] *= rescale;
  sum_[column] = sum_[column] * rescale + sum;
  largest_[column] = largest;
}

int64_t AttentionState::query_of_column(int column) const {
  const int64_t token = b_ * p_.q_len + first_token_ + column / group_;
  return token * p_.num_heads + kv_head_idx_ * group_ + column % group_;
}

const float* AttentionState::normalized(int column) {
  float* out = acc_.data() + static_cast<int64_t>(column) * p_.cache.head_dim;
  if (sum_[column] != 0.0f) {
    const float v_scale = v_scale_of(p_.cache, kv_head_idx_);
    for (int d = 0; d < p_.cache.head_dim; ++d) out[d] = out[d] / sum_[column] * v_scale;
  }
  return out;
}

float AttentionState::lse(int column) const {
  return sum_[column] == 0.0f ? kMinusInfinity : largest_[column] + std::log(sum_[column]);
}

void AttentionState::store() {
  const int head_dim = p_.cache.head_dim;
  for (int c = 0; c < num_columns_; ++c) {
    const int64_t query_idx = query_of_column(c);
    store_floats(normalized(c), head_dim, p_.dtype,
                 element(p_.out, p_.dtype, query_idx * head_dim));
    p_.lse[query_idx] = lse(c);
  }
}

void AttentionState::store_part(int split) {
  const int head_dim = p_.cache.head_dim;
  for (int c = 0; c < num_columns_; ++c) {
    const int64_t part = split * num_queries_of(p_) + query_of_column(c);
    std::copy_n(normalized(c), head_dim, p_.out_partial + part * head_dim);
    p_.lse_partial[part] = lse(c);
  }
}

void merge_parts(const AttentionParams& p, int num_parts, int64_t begin, int64_t end) {
  const int head_dim = p.cache.head_dim;
  const int64_t num_queries = num_queries_of(p);
  std::vector<float> sum(static_cast<size_t>(head_dim));
  for (int64_t query_idx = begin; query_idx < end; ++query_idx) {
    float largest = kMinusInfinity;
    for (int s = 0; s < num_parts; ++s) {
      largest = std::max(largest, p.lse_partial[s * num_queries + query_idx]);
    }
    std::fill(sum.begin(), sum.end(), 0.0f);
    float total = 0.0f;
    for (int s = 0; s < num_parts; ++s) {
      const float lse = p.lse_partial[s * num_queries + query_idx];
      if (lse == kMinusInfinity) continue;
      const float weight = std::exp(lse - largest);
      const float* out = p.out_partial + (s * num_queries + query_idx) * head_dim;
      for (int d = 0; d < head_dim; ++d) sum[d] += weight * out[d];
      total += weight;
    }
    if (total != 0.0f) {
      for (float& value : sum) value /= total;
    }
    p.lse[query_idx] = total == 0.0f ? kMinusInfinity : largest + std::log(total);
    store_floats(sum.data(), head_dim, p.dtype, element(p.out, p.dtype, query_idx * head_dim));
  }
}

}  // namespace hata
