#pragma once

#include "cuda/append_slot.cuh"
#include "cuda/cluster_cut.cuh"
#include "cuda/cp_async.cuh"
#include "cuda/projection.cuh"

// How the blocks of a cluster append the new tokens of their sequence and KV head. Loads and the
// look-up of pages are under way while the queries are encoded, and what was loaded is written when
// nobody waits for it: while the cluster looks for the cut.
namespace hata {

inline constexpr int kMaxClusterTokens = 8;
constexpr int kMaxHeadDim = 256;

struct NewTokens {
  int positions[kMaxClusterTokens];
  Slot slots[kMaxClusterTokens];
  uint32_t codes[kMaxClusterTokens][kMaxWords];  // the words that this block encodes
};

struct NewRows {
  alignas(16) uint16_t k[kMaxClusterTokens][kMaxHeadDim];
  alignas(16) uint16_t v[kMaxClusterTokens][kMaxHeadDim];
};

// Of the words of a new token's code a block of the cluster encodes rank, rank + num_blocks, ...
__device__ __forceinline__ int num_own_words(const ClusterPlace& place, int num_words) {
  return place.rank < num_words ? (num_words - 1 - place.rank) / place.num_blocks + 1 : 0;
}

// The new token that this warp appends: the block's last warps have one each. Not below q_len for
// the others.
__device__ __forceinline__ int token_of_warp() {
  return static_cast<int>(blockDim.x - 1 - threadIdx.x) / kWarpSize;
}

// Starts the copies of keys and values.
__device__ inline void load_new_rows(const CacheAppendParams& p, int batch_idx, int kv_head_idx,
                                     NewRows& rows) {
  const int token = token_of_warp(), d = threadIdx.x % kWarpSize * 8;
  if (token >= p.q_len || d >= p.cache.head_dim) return;
  cp_async_16(rows.k[token] + d,
              static_cast<const uint16_t*>(p.k) + batch_idx * p.k_batch_stride +
                  token * p.k_token_stride + kv_head_idx * p.k_head_stride + d,
              true);
  cp_async_16(rows.v[token] + d,
              static_cast<const uint16_t*>(p.v) + batch_idx * p.v_batch_stride +
                  token * p.v_token_stride + kv_head_idx * p.v_head_stride + d,
              true);
}

__device__ inline void find_slots(const CacheAppendParams& p, int batch_idx, NewTokens& tokens) {
  const int token = token_of_warp();
  if (token < p.q_len && threadIdx.x % kWarpSize == 0) {
    tokens.positions[token] = append_position(p.table, p.new_seqlens, p.q_len, batch_idx, token);
    tokens.slots[token] = slot_of(p, batch_idx, token);
  }
}

// Writes what this block appends: its words of the codes, and keys, values and norms of positions
// from `begin` to `end`, those that it also reads.
template <typename T>
__device__ __forceinline__ void write_new_tokens(const CacheAppendParams& p, int kv_head_idx,
                                                 const ClusterPlace& place, int begin, int end,
                                                 const NewTokens& tokens, const NewRows& rows) {
  const int lane = threadIdx.x % kWarpSize;
  const int token = token_of_warp();
  if (token >= p.q_len || tokens.slots[token].row < 0) return;
  const Slot slot = tokens.slots[token];
  if (lane < p.code_cache.num_words && lane % place.num_blocks == place.rank) {
    code_at(p.code_cache, slot, kv_head_idx)[lane] = tokens.codes[token][lane];
  }
  if (tokens.positions[token] < begin || tokens.positions[token] >= end) return;
  // Lane 4 s + c holds the elements of step s that thread c of a quad has elsewhere.
  const int d = lane * 8;
  uint4 piece = {};
  if (d < p.cache.head_dim) {
    piece = *reinterpret_cast<const uint4*>(rows.k[token] + d);
    T* k_row = cache_row<T>(p.cache.k, p.cache.k_page_stride, p.cache.k_token_stride,
                            p.cache.k_head_stride, slot, kv_head_idx);
    T* v_row = cache_row<T>(p.cache.v, p.cache.v_page_stride, p.cache.v_token_stride,
                            p.cache.v_head_stride, slot, kv_head_idx);
    *reinterpret_cast<uint4*>(k_row + d) = piece;
    *reinterpret_cast<uint4*>(v_row + d) = *reinterpret_cast<const uint4*>(rows.v[token] + d);
  }
  if (p.code_cache.norms == nullptr) return;
  const float squares = sum_of_squares<T>(piece);
  float sum = 0.0f;
  for (int step = 0; step < p.cache.head_dim / 32; ++step) {
    sum += __shfl_sync(kFullMask, squares, step * 4 + lane % 4);
  }
  const uint16_t norm = norm_of_quad(sum);
  if (lane == 0) *norm_at(p.code_cache, slot, kv_head_idx) = norm;
}

}  // namespace hata
