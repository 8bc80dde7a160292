#pragma once

#include <cmath>

#include "cuda/mma.cuh"
#include "gather_attention.h"

// One step of a warp of gather_attention: 16 query heads of a group against 16 selected rows.
namespace hata {

constexpr int kTileM = 16;  // query heads of a block: the rows of one matrix product
constexpr int kTileN = 16;  // selected rows of one step of a warp

// Shared memory: the queries, then for each warp its stages' tiles of keys and of values. Rows are
// padded by 16 bytes, an odd multiple of 16 in all, so that ldmatrix meets no bank conflict. At the
// end the warps' partial results take the place of the tiles. What the blocks of a cluster send
// each other (Received) lies behind.
template <int kHeadDim>
struct Tile {
  static constexpr int kPitch = kHeadDim + 8;
  static constexpr int kElements = kTileN * kPitch;
  static constexpr int kQueryBytes = kTileM * kPitch * 2;
  static constexpr int kPartialPitch = kHeadDim + 4;
  static constexpr int received_offset(int warps, int stages) {
    const int tiles = warps * stages * 2 * kElements * 2;
    const int partials = warps * kTileM * (kPartialPitch + 2) * 4;
    return kQueryBytes + (tiles > partials ? tiles : partials);
  }
  // `rows` query heads of a tile.
  static constexpr int shared_bytes(int warps, int stages, int splits, int rows) {
    return received_offset(warps, stages) + (splits > 1 ? received_bytes(splits, rows) : 0);
  }
  // Of `splits` blocks: their maxima and sums, and their share of a tile's output.
  static constexpr int received_bytes(int splits, int rows) {
    return splits * (2 * rows + share_of_block(splits, rows)) * 4;
  }
  // Elements of a tile's output that one of `splits` blocks merges.
  static constexpr int share_of_block(int splits, int rows) {
    return (rows * kHeadDim + splits - 1) / splits;
  }
};

// Where the selected rows of one (sequence, query token, KV head) are.
class RowLocator {
 public:
  __device__ RowLocator(const GatherAttentionParams& p, int batch_idx, int kv_head_idx, int visible)
      : table_(p.table),
        cache_(p.cache),
        batch_idx_(batch_idx),
        kv_head_idx_(kv_head_idx),
        visible_(visible),
        one_page_(p.table.max_pages == 1),
        first_page_(one_page_ ? page_of(p.table, batch_idx, 0) : -1) {}

  // Offsets of a position's key and value; false where the token does not see it or its page does
  // not exist.
  __device__ bool find(int position, int64_t& k_offset, int64_t& v_offset) const {
    k_offset = v_offset = 0;
    if (position < 0 || position >= visible_) return false;
    const int page = one_page_ ? first_page_ : page_of(table_, batch_idx_, position);
    if (page < 0) return false;
    const int row = row_of(table_, position);
    k_offset = page * cache_.k_page_stride + row * cache_.k_token_stride +
               kv_head_idx_ * cache_.k_head_stride;
    v_offset = page * cache_.v_page_stride + row * cache_.v_token_stride +
               kv_head_idx_ * cache_.v_head_stride;
    return true;
  }

 private:
  const PageTable& table_;
  const KvCache& cache_;
  int batch_idx_, kv_head_idx_, visible_;
  bool one_page_;
  int first_page_;
};

// A warp's running softmax over its rows: for query heads r and r + 8 (r = lane / 4) the maximum
// and the sum in base 2, and the unnormalized output in the layout of a matrix product's result.
template <int kHeadDim>
struct Accumulator {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};
  float out[kHeadDim / 8][4] = {};
};

template <typename T, int kHeadDim>
__device__ void attend_tile(Accumulator<kHeadDim>& acc, const T* q, const T* k, const T* v,
                            unsigned valid_rows, float scale_log2) {
  constexpr int kPitch = Tile<kHeadDim>::kPitch;
  const int lane = threadIdx.x % kWarpSize;

  float scores[2][4] = {};
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[4], b[4];
    load_matrix_x4(a, q + lane % 16 * kPitch + step * 16 + lane / 16 * 8);
    load_matrix_x4(b, k + (lane % 8 + lane / 16 * 8) * kPitch + step * 16 + lane / 8 % 2 * 8);
    mma_m16n8k16(scores[0], a, {b[0], b[1]}, T{});
    mma_m16n8k16(scores[1], a, {b[2], b[3]}, T{});
  }

  float tile_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = n * 8 + lane % 4 * 2 + i % 2;
      scores[n][i] = valid_rows >> column & 1u ? scores[n][i] * scale_log2 : -INFINITY;
      tile_max[i / 2] = fmaxf(tile_max[i / 2], scores[n][i]);
    }
  }
  float rescale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    tile_max[i] = fmaxf(tile_max[i], __shfl_xor_sync(kFullMask, tile_max[i], 1));
    tile_max[i] = fmaxf(tile_max[i], __shfl_xor_sync(kFullMask, tile_max[i], 2));
    const float new_max = fmaxf(acc.max[i], tile_max[i]);
    // A tile is attended only if it has a valid row; its score may still be -infinity.
    rescale[i] = acc.max[i] == -INFINITY ? 0.0f : exp2f(acc.max[i] - new_max);
    acc.max[i] = new_max;
    acc.sum[i] *= rescale[i];
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = scores[n][i] == -INFINITY ? 0.0f : exp2f(scores[n][i] - acc.max[i / 2]);
      acc.sum[i / 2] += scores[n][i];
    }
  }

  // The result of the first product is, pairwise rounded, the A operand of the second.
  const uint32_t probabilities[4] = {
      pack(scores[0][0], scores[0][1], T{}), pack(scores[0][2], scores[0][3], T{}),
      pack(scores[1][0], scores[1][1], T{}), pack(scores[1][2], scores[1][3], T{})};
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; n += 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc.out[n][i] *= rescale[i / 2];
      acc.out[n + 1][i] *= rescale[i / 2];
    }
    uint32_t b[4];
    load_matrix_x4_transposed(b, v + lane % 16 * kPitch + n * 8 + lane / 16 * 8);
    mma_m16n8k16(acc.out[n], probabilities, {b[0], b[1]}, T{});
    mma_m16n8k16(acc.out[n + 1], probabilities, {b[2], b[3]}, T{});
  }
}

}  // namespace hata
