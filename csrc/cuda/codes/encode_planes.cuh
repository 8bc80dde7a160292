#pragma once

#include "cuda/codes/projection.cuh"
#include "encode_query.h"
#include "query_planes.h"

// The pieces of encode_query, each the work of one warp.
namespace hata {

// The queries of one token and KV head: heads head_stride elements apart.
struct QueryGroup {
  const uint16_t* heads;
  int size;
  int64_t head_stride;
};

__device__ __forceinline__ QueryGroup query_group(const EncodeQueryParams& p, int batch_idx,
                                                  int token_idx, int kv_head_idx, int size) {
  return {static_cast<const uint16_t*>(p.q) + batch_idx * p.q_batch_stride +
              token_idx * p.q_token_stride + int64_t{kv_head_idx} * size * p.q_head_stride,
          size, p.q_head_stride};
}

// Projects a group onto kTileColumns columns: values[i] = sum_g q_g . W_i, or, with query_bits 1,
// how many of the q_g . W_i are positive. `weights` is the first column in shared memory; *largest
// becomes the bits of the largest |value| seen.
template <typename T>
__device__ void project_queries(const QueryGroup& group, int head_dim, int query_bits,
                                const uint16_t* weights, float* values, uint32_t* largest) {
  constexpr int kRows = 8;
  const int lane = threadIdx.x % kWarpSize;
  float sums[4] = {};
#pragma unroll 1
  for (int first = 0; first < group.size; first += kRows) {
    const int row = first + lane / 4;
    project_tile<T>(sums, row < group.size ? group.heads + row * group.head_stride : nullptr,
                    head_dim, weights);
    if (query_bits > 1) continue;  // the sums go on adding up
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // the half that stays zero counts the signs
      sums[i + 2] += static_cast<float>(sums[i] > 0.0f);
      sums[i] = 0.0f;
    }
  }
  float max = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = sum_of_lanes<Lanes::kAcrossQuads>(sums[i] + sums[i + 2]);
    max = fmaxf(max, fabsf(total));
    if (lane < 4) values[lane * 2 + i] = total;
  }
  max = max_of_lanes<Lanes::kQuad>(max);
  if (lane == 0) atomicMax(largest, __float_as_uint(max));  // ordered like the numbers: none is < 0
}

// Writes one word of every plane of a token, planes[p * num_words] for plane p, and returns
// sum_p w_p (32 - popcount(word of plane p)) in lane 0.
__device__ __forceinline__ int write_planes(const float* values, uint32_t largest_bits,
                                            int query_bits, int weight_sum, int num_words,
                                            uint32_t* planes) {
  const float value = values[threadIdx.x % kWarpSize];
  int level = static_cast<int>(value);
  if (query_bits > 1) {
    const float largest = __uint_as_float(largest_bits);
    const float m = static_cast<float>(weight_sum);
    const float x = largest > 0.0f ? __fmul_rn(__fdiv_rn(value, largest), m) : 0.0f;
    level = static_cast<int>(floorf(__fadd_rn(__fmul_rn(__fadd_rn(x, m), 0.5f), 0.5f)));
    level = min(max(level, 0), weight_sum);
  }
  const unsigned bits = level_planes(level, weight_sum);
  const int num_planes = hata::num_planes(weight_sum);
  int base = 0;
#pragma unroll 1
  for (int plane = 0; plane < num_planes; ++plane) {
    const uint32_t word = __ballot_sync(kFullMask, (bits >> plane) & 1u);
    if (threadIdx.x % kWarpSize == 0) planes[plane * num_words] = word;
    base += plane_weight(plane, weight_sum) * (kWordBits - __popc(word));
  }
  return base;
}

}  // namespace hata
