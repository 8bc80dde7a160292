#pragma once

#include "cuda/primitives/cp_async.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/warp.cuh"
#include "hash_code.h"

// Products of vectors with hash weights by one warp: 16 vectors and 32 columns, or 8 and 8. Every
// kernel that encodes keys or queries projects through this, so that the same vector gives the same
// code wherever it is encoded: the products of one column are added up in the same order.
namespace hata {

constexpr int kProjectionRows = 16;          // vectors: the rows of one matrix product
constexpr int kWeightPitch = kWordBits + 8;  // of a row of weights in shared memory: 80 bytes, no
                                             // bank conflicts

// Bytes of shared memory that the weights of one word take.
constexpr int word_weight_bytes(int head_dim) {
  return head_dim * kWeightPitch * 2;
}

// One vector's 32 elements of one step as thread c = lane % 4 of its quad holds them: elements 8c
// to 8c + 7, 16 contiguous bytes. The products of half h use elements 4h to 4h + 3 of the eight:
// the order of the inner dimension is free as long as the weights follow it.
//
// The shared-memory row of row d of the weights: d = 32 step + 8 c + 4 half + 2 m + e goes to
// 32 step + 16 half + 8 m + 2 c + e.
constexpr int weight_row(int d) {
  return d / 32 * 32 + d / 4 % 2 * 16 + d / 2 % 2 * 8 + d / 8 % 4 * 2 + d % 2;
}

// Starts the copy of the columns of one word of a head's weights [head_dim, num_words * 32] to
// shared memory. The caller commits and waits.
__device__ __forceinline__ void load_word_weights(uint16_t* to, const uint16_t* head_weights,
                                                  int head_dim, int num_words, int word, int thread,
                                                  int num_threads) {
  constexpr int kPieces = kWordBits / 8;  // 16-byte pieces of a row
#pragma unroll 1
  for (int i = thread; i < head_dim * kPieces; i += num_threads) {
    const int piece = i % kPieces, d = i / kPieces;
    cp_async_16(to + weight_row(d) * kWeightPitch + piece * 8,
                head_weights + (int64_t{d} * num_words + word) * kWordBits + piece * 8, true);
  }
}

// Adds one step, 32 elements, to the sums of 16 vectors and 32 columns. `low` and `high` are this
// thread's elements of vectors r and r + 8, r = lane / 4; `weights` the shared-memory rows of the
// step. sums[n] is the result of the product with columns 8n to 8n + 7 (mma.cuh).
template <typename T>
__device__ __forceinline__ void project_step(float (&sums)[4][4], const uint4& low,
                                             const uint4& high, const uint16_t* weights) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t a[4] = {half ? low.z : low.x, half ? high.z : high.x, half ? low.w : low.y,
                           half ? high.w : high.y};
    const int row = half * 16 + lane % 16;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, weights + row * kWeightPitch + pair * 16 + lane / 16 * 8);
      mma_m16n8k16(sums[pair * 2], a, {b[0], b[1]}, T{});
      mma_m16n8k16(sums[pair * 2 + 1], a, {b[2], b[3]}, T{});
    }
  }
}

// Columns that a warp projects few vectors onto: short chains of products, and work for many warps.
constexpr int kTileColumns = 8;
constexpr int kWordTiles = kWordBits / kTileColumns;

// Adds the products of eight vectors with kTileColumns columns of one word: `row` is vector r =
// lane / 4 in any memory, or null; `weights` the first of the columns. The results are
// sums[0] and [1]; the other half of the products' rows stays zero.
template <typename T>
__device__ __forceinline__ void project_tile(float (&sums)[4], const uint16_t* row, int head_dim,
                                             const uint16_t* weights) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 2
  for (int d = 0; d < head_dim; d += 32) {
    const uint4 elements =
        row != nullptr ? *reinterpret_cast<const uint4*>(row + d + lane % 4 * 8) : uint4{};
    uint32_t b[4];  // of both halves
    load_matrix_x4_transposed(b, weights + (d + lane) * kWeightPitch);
    mma_m16n8k16(sums, {elements.x, 0, elements.y, 0}, {b[0], b[1]}, T{});
    mma_m16n8k16(sums, {elements.z, 0, elements.w, 0}, {b[2], b[3]}, T{});
  }
}

// The signs of the sums as words: bit i of x is set where vector r's product with column i is
// positive, of y for vector r + 8. All four threads of a quad return them.
__device__ __forceinline__ uint2 sign_words(const float (&sums)[4][4]) {
  uint2 words = {0, 0};
  const int first_bit = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words.x |= static_cast<uint32_t>(sums[n][i] > 0.0f) << (n * 8 + first_bit + i);
      words.y |= static_cast<uint32_t>(sums[n][i + 2] > 0.0f) << (n * 8 + first_bit + i);
    }
  }
  return {or_of_lanes<Lanes::kQuad>(words.x), or_of_lanes<Lanes::kQuad>(words.y)};
}

// The squares of a thread's elements of one step. A vector's norm is their sum in the order of the
// steps, then over the quad.
template <typename T>
__device__ __forceinline__ float sum_of_squares(const uint4& piece) {
  const uint32_t pairs[] = {piece.x, piece.y, piece.z, piece.w};
  float sum = 0.0f;
#pragma unroll
  for (const uint32_t pair : pairs) {
    const float2 x = unpack(pair, T{});
    sum = fmaf(x.x, x.x, fmaf(x.y, x.y, sum));
  }
  return sum;
}

// The norm of a vector, as float16 bits, from the sums of squares of its quad's threads.
__device__ __forceinline__ uint16_t norm_of_quad(float sum) {
  sum = sum_of_lanes<Lanes::kQuad>(sum);
  return __half_as_ushort(__float2half_rn(fminf(sqrtf(sum), kMaxNorm)));
}

}  // namespace hata
