#include "cuda/encode_keys.h"

#include <algorithm>

#include "cuda/append_slot.cuh"
#include "cuda/codes/projection.cuh"
#include "cuda/primitives/float8.cuh"
#include "cuda/primitives/launch.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileTokens = kWarps * kProjectionRows;
// Tiles of a prompt that share one block's copy of the weights: enough that reading the weights
// costs little beside the keys, few enough that many blocks are there to hide latency.
constexpr int kTilesPerBlock = 4;
constexpr int kMaxWeightBytes =
    80 * 1024;  // of a block, so that two fit on every GPU from sm_80 on

// The 16 tokens of a warp: elements of vectors r and r + 8 for each step (projection.cuh).
template <int kHeadDim>
struct Keys {
  static constexpr int kSteps = kHeadDim / 32;
  uint4 low[kSteps];
  uint4 high[kSteps];
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void project(const Keys<kHeadDim>& keys, const uint16_t* weights,
                                        float (&sums)[4][4]) {
#pragma unroll
  for (int step = 0; step < Keys<kHeadDim>::kSteps; ++step) {
    project_step<T>(sums, keys.low[step], keys.high[step], weights + step * 32 * kWeightPitch);
  }
}

// Writes a row of float8, by a quad.
template <int kHeadDim, typename T>
__device__ __forceinline__ void write_float8_row(const T* from, float scale, uint8_t* to) {
#pragma unroll 1
  for (int d = threadIdx.x % 4 * 8; d < kHeadDim; d += 32) {
    *reinterpret_cast<uint2*>(to + d) =
        to_float8<T>(*reinterpret_cast<const uint4*>(from + d), scale);
  }
}

// grid: (blocks of tokens, num_kv_heads, groups of words). A block keeps the weights of its words
// in shared memory and goes over every gridDim.x-th tile of tokens, 16 tokens a warp. The blocks of
// the first word group copy keys and values and write norms; without codes there are no others.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    encode_keys_kernel(const __grid_constant__ CacheAppendParams p, int words_per_group) {
  extern __shared__ __align__(16) uint16_t weights[];  // [words_per_group, kHeadDim, kWeightPitch]
  constexpr int kWordStride = word_weight_bytes(kHeadDim) / 2;
  wait_for_previous_kernel();
  let_next_kernel_launch();

  const int kv_head_idx = blockIdx.y;
  const int num_words = p.code_cache.num_words;
  const int first_word = blockIdx.z * words_per_group;
  const int end_word = min(first_word + words_per_group, num_words);
  const uint16_t* head_weights = static_cast<const uint16_t*>(p.key_weights) +
                                 int64_t{kv_head_idx} * kHeadDim * num_words * kWordBits;
  for (int word = first_word; word < end_word; ++word) {
    load_word_weights(weights + (word - first_word) * kWordStride, head_weights, kHeadDim,
                      num_words, word, threadIdx.x, kThreads);
  }
  cp_async_commit();

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const bool writes_rows = blockIdx.z == 0;
  const int tiles_per_sequence = ceil_div(p.q_len, kTileTokens);
  const int num_tiles = p.table.batch * tiles_per_sequence;
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int batch_idx = tile / tiles_per_sequence;
    const int first_token =
        tile % tiles_per_sequence * kTileTokens + warp * kProjectionRows + lane / 4;
    const T* k_head =
        static_cast<const T*>(p.k) + batch_idx * p.k_batch_stride + kv_head_idx * p.k_head_stride;
    Slot slots[2];
    Keys<kHeadDim> keys = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = first_token + i * 8;
      slots[i] = slot_of(p, batch_idx, token);
      if (token >= p.q_len) continue;
      const T* row = k_head + token * p.k_token_stride + lane % 4 * 8;
#pragma unroll
      for (int step = 0; step < Keys<kHeadDim>::kSteps; ++step) {
        (i ? keys.high : keys.low)[step] = *reinterpret_cast<const uint4*>(row + step * 32);
      }
    }
    if (writes_rows && p.cache.k != nullptr) {
      const T* v_head =
          static_cast<const T*>(p.v) + batch_idx * p.v_batch_stride + kv_head_idx * p.v_head_stride;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (slots[i].row < 0) continue;
        const int token = first_token + i * 8;
        const T* from = v_head + token * p.v_token_stride + lane % 4 * 8;
        if (p.cache.dtype == DType::kFloat8E4M3) {
          write_float8_row<kHeadDim>(k_head + token * p.k_token_stride,
                                     k_scale_of(p.cache, kv_head_idx),
                                     key_at<uint8_t>(p.cache, slots[i], kv_head_idx));
          write_float8_row<kHeadDim>(v_head + token * p.v_token_stride,
                                     v_scale_of(p.cache, kv_head_idx),
                                     value_at<uint8_t>(p.cache, slots[i], kv_head_idx));
          continue;
        }
        T* k_row = key_at<T>(p.cache, slots[i], kv_head_idx);
        T* v_row = value_at<T>(p.cache, slots[i], kv_head_idx);
#pragma unroll
        for (int step = 0; step < Keys<kHeadDim>::kSteps; ++step) {
          const int d = step * 32 + lane % 4 * 8;
          *reinterpret_cast<uint4*>(k_row + d) = (i ? keys.high : keys.low)[step];
          *reinterpret_cast<uint4*>(v_row + d) = *reinterpret_cast<const uint4*>(from + step * 32);
        }
      }
    }
    if (writes_rows && p.code_cache.norms != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float squares = 0.0f;
#pragma unroll
        for (const uint4& piece : i ? keys.high : keys.low) squares += sum_of_squares<T>(piece);
        const uint16_t norm = norm_of_quad(squares);
        if (lane % 4 == 0 && slots[i].row >= 0)
          *norm_at(p.code_cache, slots[i], kv_head_idx) = norm;
      }
    }

    if (tile == blockIdx.x) {
      cp_async_wait<0>();
      __syncthreads();  // every thread's part of the weights is there
    }
    // Thread c of a quad keeps every fourth word, so that four neighbours are written at once.
    uint2 mine = {0, 0};
    for (int word = first_word; word < end_word; ++word) {
      float sums[4][4] = {};
      project<T, kHeadDim>(keys, weights + (word - first_word) * kWordStride, sums);
      const uint2 words = sign_words(sums);
      const int c = (word - first_word) % 4;
      if (lane % 4 == c) mine = words;
      if (c < 3 && word + 1 < end_word) continue;
      if (lane % 4 > c) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (slots[i].row < 0) continue;
        code_at(p.code_cache, slots[i], kv_head_idx)[word - c + lane % 4] = i ? mine.y : mine.x;
      }
    }
  }
}

template <typename T, int kHeadDim>
void launch(const CacheAppendParams& p, const char* op, CudaStream stream) {
  const int tiles = p.table.batch * ceil_div(p.q_len, kTileTokens);
  const int num_words = p.code_cache.num_words;
  // Few tokens want each word in a block of its own, a prompt wants the keys read once.
  const bool prompt = p.q_len > kProjectionRows;
  const int words_per_group =
      prompt ? std::clamp(num_words, 1, kMaxWeightBytes / word_weight_bytes(kHeadDim)) : 1;
  launch_kernel(
      encode_keys_kernel<T, kHeadDim>,
      {.grid = dim3(prompt ? ceil_div(tiles, kTilesPerBlock) : tiles, p.cache.num_kv_heads,
                    std::max(1, ceil_div(num_words, words_per_group))),
       .threads = kThreads,
       .shared_bytes = num_words == 0 ? 0 : words_per_group * word_weight_bytes(kHeadDim),
       .overlaps_previous = true},
      stream, op, p, words_per_group);
}

}  // namespace

void encode_keys(const CacheAppendParams& p, const char* op, CudaStream stream) {
  if (p.table.batch == 0 || p.q_len == 0 || p.cache.num_kv_heads == 0) return;
  dispatch_dtype(p.dtype, [&]<typename T>() {
    dispatch_int<64, 96, 128, 192, 256, 512>(
        "head_dim", p.cache.head_dim, [&](auto head_dim) { launch<T, head_dim>(p, op, stream); });
  });
}

}  // namespace hata
