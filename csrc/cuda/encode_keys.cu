#include "cuda/encode_keys.h"

#include "cuda/cp_async.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kTileM = 16;             // tokens of one warp: the rows of one matrix product
constexpr int kPitch = kWordBits + 8;  // of a row of shared weights: 80 bytes, no bank conflicts

// A block encodes kWarpsM * 16 tokens of one KV head: kWarpsN warps do the same tokens and every
// kWarpsN-th word; further warps only help to load weights. Few tokens (decoding) want each word in
// a block of its own, a prompt wants the weights shared by many tokens. The products of one key are
// added up in the same order in both, so that it has the same code in both.
template <int kHeadDim, int kWarpsM, int kWarpsN>
struct Tile {
  static constexpr int kThreads = kWarpsM * kWarpsN < 4 ? 128 : kWarpsM * kWarpsN * kWarpSize;
  static constexpr int kTokens = kWarpsM * kTileM;
  static constexpr int kSharedBytes = kWarpsN * kHeadDim * kPitch * 2;
};

// Where a token goes; row is -1 where it is not written.
struct Slot {
  int page;
  int row;
};

__device__ Slot slot_of(const CacheAppendParams& p, int batch_idx, int token_idx) {
  if (token_idx >= p.q_len) return {0, -1};
  if (p.table.block_table == nullptr) return {batch_idx, token_idx};
  const int position = append_position(p.table, p.new_seqlens, p.q_len, batch_idx, token_idx);
  if (position < 0) return {0, -1};
  const int page = page_of(p.table, batch_idx, position);
  return {page, page < 0 ? -1 : row_of(p.table, position)};
}

// The 16 tokens of a warp as A fragments. Thread (r, c) loads 16 contiguous bytes, elements 8c to
// 8c + 7 of each 32, of rows r and r + 8; the products of step s use elements 4s to 4s + 3 of the
// eight. The order of the k dimension is free as long as the weights follow it.
template <int kHeadDim>
struct Keys {
  static constexpr int kSteps = kHeadDim / 32;
  uint4 low[kSteps];   // row r
  uint4 high[kSteps];  // row r + 8
};

template <int kHeadDim, typename T>
__device__ float sum_of_squares(const uint4 (&row)[Keys<kHeadDim>::kSteps]) {
  float sum = 0.0f;
#pragma unroll
  for (const uint4& piece : row) {
    const uint32_t pairs[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (const uint32_t pair : pairs) {
      const float2 x = unpack(pair, T{});
      sum = fmaf(x.x, x.x, fmaf(x.y, x.y, sum));
    }
  }
  sum += __shfl_xor_sync(kFullMask, sum, 1);
  return sum + __shfl_xor_sync(kFullMask, sum, 2);
}

// The shared-memory row of row d of the weights, which follows the order of the products above:
// d = 32 step + 8 c + 4 half + 2 m + e goes to 32 step + 16 half + 8 m + 2 c + e.
__device__ constexpr int weight_row(int d) {
  return d / 32 * 32 + d / 4 % 2 * 16 + d / 2 % 2 * 8 + d / 8 % 4 * 2 + d % 2;
}

// One word of the codes of 16 tokens: bit i is the sign of key . weights[:, i]. Threads of a quad
// return the words of rows r and r + 8.
template <int kHeadDim, typename T>
__device__ uint2 encode_word(const Keys<kHeadDim>& keys, const T* weights) {
  const int lane = threadIdx.x % kWarpSize;
  float sums[4][4] = {};
#pragma unroll
  for (int step = 0; step < Keys<kHeadDim>::kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 &low = keys.low[step], &high = keys.high[step];
      const uint32_t a[4] = {half ? low.z : low.x, half ? high.z : high.x, half ? low.w : low.y,
                             half ? high.w : high.y};
      const int row = step * 32 + half * 16 + lane % 16;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, weights + row * kPitch + pair * 16 + lane / 16 * 8);
        mma_m16n8k16(sums[pair * 2], a, {b[0], b[1]}, T{});
        mma_m16n8k16(sums[pair * 2 + 1], a, {b[2], b[3]}, T{});
      }
    }
  }
  uint2 words = {0, 0};
  const int first_bit = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words.x |= static_cast<uint32_t>(sums[n][i] > 0.0f) << (n * 8 + first_bit + i);
      words.y |= static_cast<uint32_t>(sums[n][i + 2] > 0.0f) << (n * 8 + first_bit + i);
    }
  }
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    words.x |= __shfl_xor_sync(kFullMask, words.x, mask);
    words.y |= __shfl_xor_sync(kFullMask, words.y, mask);
  }
  return words;
}

template <typename T>
__device__ void copy_row(T* to, const T* from, int head_dim, int thread, int num_threads) {
  for (int i = thread * 8; i < head_dim; i += num_threads * 8) {
    *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
  }
}

// Starts the copy of the weights of kWarpsN words from first_word on.
template <int kHeadDim, int kWarpsM, int kWarpsN, typename T>
__device__ void load_weights(T* to, const T* head_weights, int first_word, int num_words) {
  constexpr int kPieces = kWordBits / 8;  // 16-byte pieces of a word's row
  for (int i = threadIdx.x; i < kWarpsN * kHeadDim * kPieces;
       i += Tile<kHeadDim, kWarpsM, kWarpsN>::kThreads) {
    const int piece = i % kPieces, n = i / kPieces % kWarpsN, d = i / kPieces / kWarpsN;
    if (first_word + n >= num_words) continue;
    cp_async_16(to + (n * kHeadDim + weight_row(d)) * kPitch + piece * 8,
                head_weights + int64_t{d} * num_words * kWordBits + (first_word + n) * kWordBits +
                    piece * 8,
                true);
  }
  cp_async_commit();
}

// grid: (batch * token tiles, num_kv_heads, word groups).
template <typename T, int kHeadDim, int kWarpsM, int kWarpsN>
__global__ void __launch_bounds__(Tile<kHeadDim, kWarpsM, kWarpsN>::kThreads)
    encode_keys_kernel(const __grid_constant__ CacheAppendParams p) {
  using Tile = Tile<kHeadDim, kWarpsM, kWarpsN>;
  extern __shared__ __align__(16) char shared[];
  T* weights = reinterpret_cast<T*>(shared);  // [kWarpsN, kHeadDim, kPitch]
  wait_for_previous_kernel();
  let_next_kernel_launch();

  const int tiles = ceil_div(p.q_len, Tile::kTokens);
  const int batch_idx = blockIdx.x / tiles;
  const int kv_head_idx = blockIdx.y;
  const int num_words = p.code_cache.num_words;
  int first_word = blockIdx.z * kWarpsN;
  const T* head_weights = static_cast<const T*>(p.key_weights) +
                          int64_t{kv_head_idx} * kHeadDim * num_words * kWordBits;
  load_weights<kHeadDim, kWarpsM, kWarpsN>(weights, head_weights, first_word, num_words);

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_m = warp / kWarpsN, warp_n = warp % kWarpsN;
  const bool encodes = warp_m < kWarpsM;
  // Who copies keys and values and writes norms, of the warps that hold the same tokens.
  const bool writes_rows = encodes && warp_n == 0 && blockIdx.z == 0;
  const int first_token = blockIdx.x % tiles * Tile::kTokens + warp_m * kTileM;

  const int tokens[2] = {first_token + lane / 4, first_token + lane / 4 + 8};
  Slot slots[2] = {{0, -1}, {0, -1}};
  Keys<kHeadDim> keys = {};
  const T* k_head =
      static_cast<const T*>(p.k) + batch_idx * p.k_batch_stride + kv_head_idx * p.k_head_stride;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!encodes || tokens[i] >= p.q_len) continue;
    const T* row = k_head + tokens[i] * p.k_token_stride + lane % 4 * 8;
#pragma unroll
    for (int step = 0; step < Keys<kHeadDim>::kSteps; ++step) {
      (i ? keys.high : keys.low)[step] = *reinterpret_cast<const uint4*>(row + step * 32);
    }
    slots[i] = slot_of(p, batch_idx, tokens[i]);
  }

  if (writes_rows && p.cache.k != nullptr) {
    const T* v_head =
        static_cast<const T*>(p.v) + batch_idx * p.v_batch_stride + kv_head_idx * p.v_head_stride;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (slots[i].row < 0) continue;
      T* k_row = static_cast<T*>(p.cache.k) + slots[i].page * p.cache.k_page_stride +
                 slots[i].row * p.cache.k_token_stride + kv_head_idx * p.cache.k_head_stride;
      T* v_row = static_cast<T*>(p.cache.v) + slots[i].page * p.cache.v_page_stride +
                 slots[i].row * p.cache.v_token_stride + kv_head_idx * p.cache.v_head_stride;
#pragma unroll
      for (int step = 0; step < Keys<kHeadDim>::kSteps; ++step) {
        *reinterpret_cast<uint4*>(k_row + step * 32 + lane % 4 * 8) =
            (i ? keys.high : keys.low)[step];
      }
      copy_row(v_row, v_head + tokens[i] * p.v_token_stride, kHeadDim, lane % 4, 4);
    }
  }

  if (p.code_cache.norms != nullptr) {
    const float squares[2] = {sum_of_squares<kHeadDim, T>(keys.low),
                              sum_of_squares<kHeadDim, T>(keys.high)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!writes_rows || lane % 4 != 0 || slots[i].row < 0) continue;
      const __half norm = __float2half_rn(fminf(sqrtf(squares[i]), kMaxNorm));
      p.code_cache.norms[slots[i].page * p.code_cache.norm_page_stride +
                         kv_head_idx * p.code_cache.norm_head_stride + slots[i].row] =
          __half_as_ushort(norm);
    }
  }

  for (; first_word < num_words; first_word += gridDim.z * kWarpsN) {
    cp_async_wait<0>();
    __syncthreads();
    const int word = first_word + warp_n;
    if (encodes && word < num_words) {
      const uint2 words = encode_word<kHeadDim, T>(keys, weights + warp_n * kHeadDim * kPitch);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (lane % 4 != i || slots[i].row < 0) continue;
        p.code_cache.codes[slots[i].page * p.code_cache.code_page_stride +
                           kv_head_idx * p.code_cache.code_head_stride +
                           int64_t{slots[i].row} * num_words + word] = i ? words.y : words.x;
      }
    }
    __syncthreads();
    load_weights<kHeadDim, kWarpsM, kWarpsN>(weights, head_weights,
                                             first_word + gridDim.z * kWarpsN, num_words);
  }
}

template <typename T, int kHeadDim, int kWarpsM, int kWarpsN>
void launch(const CacheAppendParams& p, const char* op, int word_groups, CudaStream stream) {
  using Tile = Tile<kHeadDim, kWarpsM, kWarpsN>;
  launch_kernel(encode_keys_kernel<T, kHeadDim, kWarpsM, kWarpsN>,
                {.grid = dim3(p.table.batch * ceil_div(p.q_len, Tile::kTokens),
                              p.cache.num_kv_heads, word_groups),
                 .threads = Tile::kThreads,
                 .shared_bytes = Tile::kSharedBytes,
                 .overlaps_previous = true},
                stream, op, p);
}

}  // namespace

void encode_keys(const CacheAppendParams& p, const char* op, CudaStream stream) {
  if (p.table.batch == 0 || p.q_len == 0 || p.cache.num_kv_heads == 0) return;
  dispatch_dtype(p.cache.dtype, [&]<typename T>() {
    dispatch_int<64, 96, 128, 192, 256>("head_dim", p.cache.head_dim, [&](auto head_dim) {
      if (p.q_len <= kTileM) {
        launch<T, head_dim, 1, 1>(p, op, p.code_cache.num_words, stream);
      } else {
        launch<T, head_dim, 4, 2>(p, op, 1, stream);
      }
    });
  });
}

}  // namespace hata
