#include "gather_attention.h"

#include <cmath>

#include "cuda/attention_state.cuh"
#include "cuda/cp_async.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kTileM = 16;  // query heads of a block: the rows of one matrix product
constexpr int kTileN = 16;  // selected rows of one step of a warp
constexpr int kStages = 2;  // steps in flight a warp
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Shared memory: the queries, then for each warp kStages tiles of keys and of values. Rows are
// padded by 16 bytes, an odd multiple of 16 in all, so that ldmatrix meets no bank conflict. At the
// end the warps' partial results take the place of the tiles.
template <int kHeadDim>
struct Tile {
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2;  // under 99 KB, what most cards have
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kPitch = kHeadDim + 8;
  static constexpr int kElements = kTileN * kPitch;
  static constexpr int kQueryBytes = kTileM * kPitch * 2;
  static constexpr int kPartialPitch = kHeadDim + 4;
  static constexpr int kStageBytes = kWarps * kStages * 2 * kElements * 2;
  static constexpr int kPartialBytes = kWarps * kTileM * (kPartialPitch + 2) * 4;
  static constexpr int kSharedBytes =
      kQueryBytes + (kStageBytes > kPartialBytes ? kStageBytes : kPartialBytes);
};

struct Row {
  int64_t k_offset, v_offset;
  bool valid;
};

// The i-th selected row of a (sequence, query token, KV head), if its index is one that the token
// sees and its page exists.
__device__ Row row_at(const GatherAttentionParams& p, const int32_t* indices, int i, int end,
                      int visible, int batch_idx, int kv_head_idx) {
  const int position = i < end ? indices[i] : -1;
  if (position < 0 || position >= visible) return {0, 0, false};
  const int page = page_of(p.table, batch_idx, position);
  if (page < 0) return {0, 0, false};
  const int row = row_of(p.table, position);
  return {page * p.cache.k_page_stride + row * p.cache.k_token_stride +
              kv_head_idx * p.cache.k_head_stride,
          page * p.cache.v_page_stride + row * p.cache.v_token_stride +
              kv_head_idx * p.cache.v_head_stride,
          true};
}

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

// grid: (batch * q_len * num_kv_heads * num_splits, ceil_div(group, kTileM)). A block attends over
// one split of the selected rows for up to 16 query heads of a group. Each warp takes every
// kWarps-th tile of 16 rows and runs by itself, copying its next tile while it computes on this
// one; the block then merges its warps.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Tile<kHeadDim>::kThreads)
    gather_attention_kernel(const __grid_constant__ GatherAttentionParams p) {
  using Tile = Tile<kHeadDim>;
  constexpr int kWarps = Tile::kWarps, kThreads = Tile::kThreads;
  extern __shared__ __align__(16) char shared[];
  wait_for_previous_kernel();
  let_next_kernel_launch();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int split = blockIdx.x % p.num_splits;
  const int64_t pair = blockIdx.x / p.num_splits;
  const int num_kv_heads = p.cache.num_kv_heads, group_size = p.num_heads / num_kv_heads;
  const int kv_head_idx = pair % num_kv_heads;
  const int64_t token = pair / num_kv_heads;  // of batch * q_len
  const int batch_idx = token / p.q_len, j = token % p.q_len;
  const int first_head = kv_head_idx * group_size + blockIdx.y * kTileM;
  const int num_rows_m = min(kTileM, (kv_head_idx + 1) * group_size - first_head);
  const int visible = visible_len(seq_len_of(p.table, batch_idx), p.q_len, j);
  const int32_t* indices = p.indices + pair * p.top_k;

  T* q_tile = reinterpret_cast<T*>(shared);
  T* stages =
      reinterpret_cast<T*>(shared + Tile::kQueryBytes) + warp * kStages * 2 * Tile::kElements;
  constexpr int kPieces = kHeadDim / 8;  // 16-byte pieces of a row

  const T* q = static_cast<const T*>(p.q) + batch_idx * p.q_batch_stride + j * p.q_token_stride +
               first_head * p.q_head_stride;
  for (int i = threadIdx.x; i < kTileM * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    cp_async_16(q_tile + row * Tile::kPitch + piece * 8,
                row < num_rows_m ? q + row * p.q_head_stride + piece * 8 : p.q, row < num_rows_m);
  }
  cp_async_commit();

  const int tiles = ceil_div(p.top_k, kTileN);
  const int tiles_per_split = ceil_div(tiles, p.num_splits);
  const int first_tile = split * tiles_per_split;
  const int end_tile = min(tiles, first_tile + tiles_per_split);

  // Starts the copy of a tile and returns which of its 16 rows are valid.
  const auto fetch = [&](int tile, int stage) -> unsigned {
    unsigned valid_rows = 0;
    if (tile < end_tile) {
      const Row mine = row_at(p, indices, tile * kTileN + lane % kTileN, p.top_k, visible,
                              batch_idx, kv_head_idx);
      valid_rows = __ballot_sync(kFullMask, mine.valid) & 0xffffu;
      if (valid_rows != 0) {
        T* k_tile = stages + stage * 2 * Tile::kElements;
        T* v_tile = k_tile + Tile::kElements;
#pragma unroll 4
        for (int i = lane; i < kTileN * kPieces; i += kWarpSize) {
          const int row = i / kPieces, piece = i % kPieces;
          const int64_t k_offset = __shfl_sync(kFullMask, mine.k_offset, row);
          const int64_t v_offset = __shfl_sync(kFullMask, mine.v_offset, row);
          const bool valid = valid_rows >> row & 1u;
          const int to = row * Tile::kPitch + piece * 8;
          cp_async_16(k_tile + to, static_cast<const T*>(p.cache.k) + k_offset + piece * 8, valid);
          cp_async_16(v_tile + to, static_cast<const T*>(p.cache.v) + v_offset + piece * 8, valid);
        }
      }
    }
    cp_async_commit();
    return valid_rows;
  };

  Accumulator<kHeadDim> acc;
  unsigned valid_rows = fetch(first_tile + warp, 0);
  cp_async_wait<1>();
  __syncthreads();  // every thread's part of the queries is there
  const float scale_log2 = p.softmax_scale * kLog2E;
  for (int tile = first_tile + warp, step = 0; tile < end_tile; tile += kWarps, ++step) {
    const unsigned next_valid_rows = fetch(tile + kWarps, (step + 1) % kStages);
    cp_async_wait<1>();
    __syncwarp();
    if (valid_rows != 0) {
      const T* k_tile = stages + step % kStages * 2 * Tile::kElements;
      attend_tile<T, kHeadDim>(acc, q_tile, k_tile, k_tile + Tile::kElements, valid_rows,
                               scale_log2);
    }
    __syncwarp();
    valid_rows = next_valid_rows;
  }
  cp_async_wait<0>();
  __syncthreads();

  // The warps' partial results: out [kWarps, kTileM, kPartialPitch], max and sum [kWarps, kTileM].
  float* partial_out = reinterpret_cast<float*>(shared + Tile::kQueryBytes);
  float* partial_max = partial_out + kWarps * kTileM * Tile::kPartialPitch;
  float* partial_sum = partial_max + kWarps * kTileM;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    acc.sum[i] += __shfl_xor_sync(kFullMask, acc.sum[i], 1);
    acc.sum[i] += __shfl_xor_sync(kFullMask, acc.sum[i], 2);
    const int row = warp * kTileM + lane / 4 + i * 8;
    if (lane % 4 == 0) {
      partial_max[row] = acc.max[i];
      partial_sum[row] = acc.sum[i];
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(partial_out + row * Tile::kPartialPitch + n * 8 + lane % 4 * 2) =
          make_float2(acc.out[n][2 * i], acc.out[n][2 * i + 1]);
    }
  }
  __syncthreads();

  const int64_t num_rows = int64_t{p.table.batch} * p.q_len * p.num_heads;
  const int64_t first_row = token * p.num_heads + first_head;
  for (int i = threadIdx.x; i < num_rows_m * kHeadDim; i += kThreads) {
    const int m = i / kHeadDim, d = i % kHeadDim;
    float max = -INFINITY, sum = 0.0f, out = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, partial_max[w * kTileM + m]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int row = w * kTileM + m;
      const float weight = partial_sum[row] == 0.0f ? 0.0f : exp2f(partial_max[row] - max);
      sum += weight * partial_sum[row];
      out += weight * partial_out[row * Tile::kPartialPitch + d];
    }
    out = sum == 0.0f ? 0.0f : out / sum;
    const float lse = sum == 0.0f ? -INFINITY : (max + log2f(sum)) * kLn2;
    const int64_t row = first_row + m;
    if (p.num_splits == 1) {
      static_cast<T*>(p.out)[row * kHeadDim + d] = static_cast<T>(out);
      if (d == 0) p.lse[row] = lse;
    } else {
      p.out_partial[(split * num_rows + row) * kHeadDim + d] = out;
      if (d == 0) p.lse_partial[split * num_rows + row] = lse;
    }
  }
}

// grid: batch * q_len * num_heads, one thread an element: merges the splits of a row.
template <typename T>
__global__ void combine_splits_kernel(const __grid_constant__ GatherAttentionParams p) {
  const int64_t num_rows = int64_t{p.table.batch} * p.q_len * p.num_heads;
  const int64_t row = blockIdx.x;
  wait_for_previous_kernel();
  let_next_kernel_launch();
  float max = -INFINITY;
  for (int s = 0; s < p.num_splits; ++s) max = fmaxf(max, p.lse_partial[s * num_rows + row]);
  float sum = 0.0f, out = 0.0f;
  for (int s = 0; s < p.num_splits; ++s) {
    const float weight = state_weight(p.lse_partial[s * num_rows + row], max);
    sum += weight;
    out += weight * p.out_partial[(s * num_rows + row) * p.cache.head_dim + threadIdx.x];
  }
  static_cast<T*>(p.out)[row * p.cache.head_dim + threadIdx.x] =
      static_cast<T>(sum == 0.0f ? 0.0f : out / sum);
  if (threadIdx.x == 0) p.lse[row] = sum == 0.0f ? -INFINITY : max + logf(sum);
}

template <typename T, int kHeadDim>
void launch(const GatherAttentionParams& p, CudaStream stream) {
  constexpr const char* kOp = "hata::gather_attention";
  const int64_t pairs = int64_t{p.table.batch} * p.q_len * p.cache.num_kv_heads;
  if (pairs == 0) return;
  launch_kernel(gather_attention_kernel<T, kHeadDim>,
                {.grid = dim3(static_cast<unsigned>(pairs * p.num_splits),
                              ceil_div(p.num_heads / p.cache.num_kv_heads, kTileM)),
                 .threads = Tile<kHeadDim>::kThreads,
                 .shared_bytes = Tile<kHeadDim>::kSharedBytes,
                 .overlaps_previous = true},
                stream, kOp, p);
  if (p.num_splits == 1) return;
  const int64_t rows = int64_t{p.table.batch} * p.q_len * p.num_heads;
  launch_kernel(
      combine_splits_kernel<T>,
      {.grid = dim3(static_cast<unsigned>(rows)), .threads = kHeadDim, .overlaps_previous = true},
      stream, kOp, p);
}

}  // namespace

void gather_attention_cuda(const GatherAttentionParams& p, CudaStream stream) {
  dispatch_dtype(p.cache.dtype, [&]<typename T>() {
    dispatch_int<64, 96, 128, 192, 256>("head_dim", p.cache.head_dim,
                                        [&](auto head_dim) { launch<T, head_dim>(p, stream); });
  });
}

}  // namespace hata
