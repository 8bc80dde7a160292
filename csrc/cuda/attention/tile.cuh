#pragma once

#include <cmath>

#include "attention.h"
#include "cuda/attention/operands.cuh"
#include "cuda/primitives/attention_state.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/warp.cuh"

// One step of a warp of gather_attention or dense_attention: 16 rows against eight or sixteen query
// heads. Rows are the long side of the matrix products and heads the short one, so that a group of
// up to eight heads pays for eight.
namespace hata {

constexpr int kTileHeads = 8;  // query heads of one matrix product

// A warp's running softmax over its rows: for query heads 2c and 2c + 1 (c = lane % 4) of each tile
// of heads the maximum in base 2 and this thread's part of the sum, and the unnormalized output,
// transposed: of each block n of 16 channels rows r and r + 8 (r = lane / 4) in the layout of a
// matrix product's result, which OutputChannels tells apart.
template <int kHeadDim, int kHeadTiles>
struct Accumulator {
  float max[kHeadTiles][2];
  float sum[kHeadTiles][2] = {};
  float out[kHeadTiles][kHeadDim / 16][4] = {};

  __device__ Accumulator() {
    for (auto& pair : max) pair[0] = pair[1] = -INFINITY;
  }
};

// The probabilities of a tile's rows, rounded to pairs, as operands of the second product, and
// what the output so far is to be multiplied by.
template <int kHeadTiles>
struct TileWeights {
  uint32_t pairs[kHeadTiles][2];
  float rescale[kHeadTiles][2];
};

// Turns products of queries and keys into logits in base 2, where no softcap is asked for.
struct PlainScale {
  float scale;
  __device__ float operator()(float x) const { return x * scale; }
};

// Turns products of queries and keys into logits in base 2, with softcap if there is one. With y =
// softmax_scale x / softcap, tanh(y) = 1 - 2 / (exp(2 y) + 1) is off by a few roundings of 1, and
// the logit of softcap.
class LogitScale {
 public:
  // `k_scale` is the keys' own factor.
  __device__ LogitScale(const AttentionParams& p, float k_scale)
      : p_(p),
        scale_(p.softmax_scale * k_scale * kLog2E * (p.softcap == 0.0f ? 1.0f : 2.0f / p.softcap)) {
  }

  __device__ float operator()(float x) const {
    const float scaled = x * scale_;
    if (p_.softcap == 0.0f) return scaled;
    return p_.softcap * kLog2E * (1.0f - __fdividef(2.0f, exp2f(scaled) + 1.0f));
  }

 private:
  const AttentionParams& p_;  // constant memory: only the scale takes a register
  float scale_;
};

// Scores a tile, by the first product and the softmax: rows of `k` times queries, of which
// complete(products) makes whole ones. Query head 2c + i of tile m attends to the valid rows of
// which sees(row, m, i) is true.
template <typename T, int kHeadDim, int kHeadTiles, typename Scale, typename Sees,
          typename Complete>
__device__ __forceinline__ TileWeights<kHeadTiles> score_tile(
    Accumulator<kHeadDim, kHeadTiles>& acc, const Operand<T>* q, const T* k, unsigned valid_rows,
    const Scale& scale, const Sees& sees, const Complete& complete) {
  constexpr int kPitch = Tile<Operand<T>, kHeadDim>::kPitch;
  const int lane = threadIdx.x % kWarpSize;
  float scores[kHeadTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; step += 2) {
    uint32_t a[2][4];
    load_keys<kHeadDim>(a, k, step);
#pragma unroll
    for (int m = 0; m < kHeadTiles; ++m) {
      uint32_t b[4];  // of both steps
      load_matrix_x4(b, q + (m * kTileHeads + lane % 8) * kPitch + step * 16 + lane / 8 * 8);
      mma_m16n8k16(scores[m], a[0], {b[0], b[1]}, Operand<T>{});
      mma_m16n8k16(scores[m], a[1], {b[2], b[3]}, Operand<T>{});
    }
  }
  complete(scores);

  const bool valid[2] = {(valid_rows >> lane / 4 & 1u) != 0,
                         (valid_rows >> lane / 4 & 0x100u) != 0};
  TileWeights<kHeadTiles> weights;
#pragma unroll
  for (int m = 0; m < kHeadTiles; ++m) {
    float (&s)[4] = scores[m];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool counts = valid[i / 2] && sees(lane / 4 + i / 2 * 8, m, i % 2);
      s[i] = counts ? scale(s[i]) : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float max =
          fmaxf(acc.max[m][i], max_of_lanes<Lanes::kAcrossQuads>(fmaxf(s[i], s[i + 2])));
      weights.rescale[m][i] = weight_in_union(acc.max[m][i], max);
      acc.max[m][i] = max;
      acc.sum[m][i] *= weights.rescale[m][i];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& score = s[row * 2 + i];
        score = score == -INFINITY ? 0.0f : exp2f(score - max);
        acc.sum[m][i] += score;
      }
    }
    weights.pairs[m][0] = transpose_matrix(pack(s[0], s[1], Operand<T>{}));
    weights.pairs[m][1] = transpose_matrix(pack(s[2], s[3], Operand<T>{}));
  }
  return weights;
}

// Adds a tile to the output, by the second product: rows of `v`, transposed, times their
// probabilities.
template <typename T, int kHeadDim, int kHeadTiles>
__device__ __forceinline__ void add_values(Accumulator<kHeadDim, kHeadTiles>& acc, const T* v,
                                           const TileWeights<kHeadTiles>& weights) {
  constexpr int kBlocks = kValueBlocks<T>;
  const int lane = lane_here();
#pragma unroll
  for (int block = 0; block < kHeadDim / 16; block += kBlocks) {
    uint32_t a[kBlocks][4];
    load_values<kHeadDim>(a, v, block, lane);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int m = 0; m < kHeadTiles; ++m) {
        float (&out)[4] = acc.out[m][block + n];
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] *= weights.rescale[m][i % 2];
        mma_m16n8k16(out, a[n], {weights.pairs[m][0], weights.pairs[m][1]}, Operand<T>{});
      }
    }
  }
}

}  // namespace hata
