#pragma once

#include <type_traits>

#include "cuda/primitives/float8.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/warp.cuh"
#include "hash_code.h"

// Tiles of rows in shared memory, and how they become operands of matrix products. 16-bit rows are
// multiplied as they lie there. Float8 rows become float16 in registers, without rounding, so that
// their queries and probabilities are float16 too; their scales are factors of the logits and of
// the output. A load of 8 x 8 matrices takes two float8 for one element, which brings a thread
// other channels than its place in a product stands for: products are told their channels in
// another order, the queries' and the output's.
namespace hata {

constexpr int kTileRows = 16;  // rows of one step of a warp

template <typename T>
inline constexpr bool kIsFloat8 = std::is_same_v<T, __nv_fp8_e4m3>;

// What rows of T are multiplied as.
template <typename T>
using Operand = std::conditional_t<kIsFloat8<T>, __half, T>;

// Tiles of keys, of values and of queries in shared memory. Their rows are padded by 16 bytes, an
// odd multiple of 16 in all, so that ldmatrix meets no bank conflict.
template <typename T, int kHeadDim>
struct Tile {
  static constexpr int kPitch = kHeadDim + 16 / sizeof(T);
  static constexpr int kElements = kTileRows * kPitch;
  static constexpr int kStageBytes = 2 * kElements * sizeof(T);  // keys and values
};

// Loads channels 16 step to 16 step + 31 of a tile of keys, as A of two products.
template <int kHeadDim, typename T>
__device__ __forceinline__ void load_keys(uint32_t (&a)[2][4], const T* keys, int step) {
  // Registers are scarcer beside float8, whose operands are made in them.
  const int lane = kIsFloat8<T> ? lane_here() : threadIdx.x % kWarpSize;
  const T* row = keys + lane % 16 * Tile<T, kHeadDim>::kPitch + step * 16;
  if constexpr (kIsFloat8<T>) {
    // Thread c of a quad has channels 4c to 4c + 3 of each 16.
    uint32_t m[4];
    load_matrix_x4(m, row + lane / 16 * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i / 2][i % 2] = float8_to_half2(m[i]);
      a[i / 2][i % 2 + 2] = float8_to_half2(m[i] >> 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) load_matrix_x4(a[i], row + i * 16 + lane / 16 * 8);
  }
}

// Puts `heads` queries in shared memory, which are of `dtype`, into the order that load_keys() has
// channels in, and rounds them to its type: by a whole block, after a barrier; ends with another.
template <typename T, int kHeadDim>
__device__ __forceinline__ void prepare_queries(Operand<T>* queries, int heads, DType dtype) {
  if constexpr (kIsFloat8<T>) {
    constexpr int kSteps = kHeadDim / 16;
    const auto to_half2 = [&](uint32_t pair) {
      if (dtype == DType::kFloat16) return pair;
      const float2 x = unpack(pair, __nv_bfloat16{});
      return pack(x.x, x.y, __half{});
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * kSteps; i += blockDim.x) {
      const auto step = reinterpret_cast<uint4*>(
          queries + i / kSteps * Tile<Operand<T>, kHeadDim>::kPitch + i % kSteps * 16);
      const uint4 low = step[0], high = step[1];
      step[0] = {to_half2(low.x), to_half2(low.z), to_half2(high.x), to_half2(high.z)};
      step[1] = {to_half2(low.y), to_half2(low.w), to_half2(high.y), to_half2(high.w)};
    }
    __syncthreads();
  }
}

// Loads channels 16 block to 16 (block + kBlocks) - 1 of a tile of values, transposed, as A of
// kBlocks products.
template <typename T>
inline constexpr int kValueBlocks = kIsFloat8<T> ? 2 : 1;

template <int kHeadDim, typename T>
__device__ __forceinline__ void load_values(uint32_t (&a)[kValueBlocks<T>][4], const T* values,
                                            int block, int lane) {
  constexpr int kPitch = Tile<T, kHeadDim>::kPitch;
  if constexpr (kIsFloat8<T>) {
    // An element is two channels of one row: a thread has those of two rows, and sorts them.
    uint32_t m[4];
    load_matrix_x4_transposed(m, values + lane % 16 * kPitch + block * 16 + lane / 16 * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t channels = __byte_perm(m[i], 0, 0x3120);
      a[i / 2][i % 2 * 2] = float8_to_half2(channels);
      a[i / 2][i % 2 * 2 + 1] = float8_to_half2(channels >> 16);
    }
  } else {
    load_matrix_x4_transposed(
        a[0], values + (lane % 8 + lane / 16 * 8) * kPitch + block * 16 + lane / 8 % 2 * 8);
  }
}

// Of a block of 16 channels, row r of its product is channel r kStep, and row r + 8 kNext further.
template <typename T>
struct OutputChannels {
  static constexpr int kStep = kIsFloat8<T> ? 2 : 1;
  static constexpr int kNext = kIsFloat8<T> ? 1 : 8;
};

}  // namespace hata
