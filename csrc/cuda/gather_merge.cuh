#pragma once

#include "cuda/gather_tile.cuh"

// Merging the softmaxes of gather_attention's warps and of the blocks of a cluster.
namespace hata {

// What a block's warps leave behind for the queries of a tile: the unnormalized output, the maximum
// and the sum, in base 2.
template <int kHeadDim, int kWarps>
struct Partials {
  float* out;  // [kWarps, kTileM, kPartialPitch]
  float* max;  // [kWarps, kTileM]
  float* sum;  // [kWarps, kTileM]

  __device__ explicit Partials(char* shared)
      : out(reinterpret_cast<float*>(shared)),
        max(out + kWarps * kTileM * Tile<kHeadDim>::kPartialPitch),
        sum(max + kWarps * kTileM) {}

  // Of the first `rows` queries at least.
  __device__ void store(const Accumulator<kHeadDim>& acc, int rows) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i * 8 >= rows) break;
      float total = acc.sum[i];
      total += __shfl_xor_sync(kFullMask, total, 1);
      total += __shfl_xor_sync(kFullMask, total, 2);
      const int row = warp * kTileM + lane / 4 + i * 8;
      if (lane % 4 == 0) {
        max[row] = acc.max[i];
        sum[row] = total;
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(out + row * Tile<kHeadDim>::kPartialPitch + n * 8 +
                                   lane % 4 * 2) =
            make_float2(acc.out[n][2 * i], acc.out[n][2 * i + 1]);
      }
    }
  }
};

// What the blocks of a cluster send a block in its shared memory: the maxima and sums of all of
// them, and the outputs of the elements that this block merges.
struct Received {
  float* max;  // [num_splits, rows]
  float* sum;  // [num_splits, rows]
  float* out;  // [num_splits, share]

  __device__ Received(char* memory, int num_splits, int rows)
      : max(reinterpret_cast<float*>(memory)),
        sum(max + num_splits * rows),
        out(sum + num_splits * rows) {}
};

// One element of the union of several parts.
struct MergedElement {
  float max, sum, out;
};

// part(i) returns the maximum, sum and output of part i.
template <int kMaxParts, typename Part>
__device__ __forceinline__ MergedElement merge_parts(int num_parts, const Part& part) {
  MergedElement parts[kMaxParts];
  MergedElement merged = {-INFINITY, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kMaxParts; ++i) {
    parts[i] = i < num_parts ? part(i) : MergedElement{-INFINITY, 0.0f, 0.0f};
    merged.max = fmaxf(merged.max, parts[i].max);
  }
#pragma unroll
  for (int i = 0; i < kMaxParts; ++i) {
    const float weight = parts[i].sum == 0.0f ? 0.0f : exp2f(parts[i].max - merged.max);
    merged.sum += weight * parts[i].sum;
    merged.out += weight * parts[i].out;
  }
  return merged;
}

}  // namespace hata
