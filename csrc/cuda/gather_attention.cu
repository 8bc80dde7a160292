#include "gather_attention.h"

#include <cooperative_groups.h>

#include <cmath>

#include "cuda/attention_state.cuh"
#include "cuda/cluster_barrier.cuh"
#include "cuda/cp_async.cuh"
#include "cuda/gather_merge.cuh"
#include "cuda/gather_shape.cuh"
#include "cuda/gather_tile.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct GatherParams : GatherAttentionParams {
  int stages;       // 1 to kMaxStages
  bool is_cluster;  // the splits of a block's queries are one cluster, which combines them
};

// Waits for the oldest of 1 to kMaxStages + 1 groups of copies.
__device__ __forceinline__ void wait_for_oldest(int groups) {
  static_assert(kMaxStages == 3);
  switch (groups) {
    case 1:
      return cp_async_wait<0>();
    case 2:
      return cp_async_wait<1>();
    case 3:
      return cp_async_wait<2>();
    default:
      return cp_async_wait<3>();
  }
}

// grid: (batch * q_len * num_kv_heads * num_splits, ceil_div(group, kTileM)). A block attends over
// one split of the selected rows for up to 16 query heads of a group. Each warp takes every
// kWarps-th tile of 16 rows and runs by itself, with the copies of its next tiles under way while
// it computes on this one; the block then merges its warps, and each block of a cluster its share
// of what all of them send.
template <typename T, int kHeadDim, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    gather_attention_kernel(const __grid_constant__ GatherParams p) {
  using Tile = Tile<kHeadDim>;
  constexpr int kThreads = kWarps * kWarpSize;
  extern __shared__ __align__(16) char shared[];
  if (p.is_cluster) arrive_at_cluster_barrier();
  if (!p.queries_are_ready) wait_for_previous_kernel();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int split = blockIdx.x % p.num_splits;
  const int64_t pair = blockIdx.x / p.num_splits;
  const int num_kv_heads = p.cache.num_kv_heads, group_size = p.num_heads / num_kv_heads;
  const int kv_head_idx = pair % num_kv_heads;
  const int64_t token = pair / num_kv_heads;  // of batch * q_len
  const int batch_idx = token / p.q_len, j = token % p.q_len;
  const int first_head = kv_head_idx * group_size + blockIdx.y * kTileM;
  const int num_rows_m = min(kTileM, (kv_head_idx + 1) * group_size - first_head);
  const int32_t* indices = p.indices + pair * p.top_k;

  T* q_tile = reinterpret_cast<T*>(shared);
  T* stages =
      reinterpret_cast<T*>(shared + Tile::kQueryBytes) + warp * p.stages * 2 * Tile::kElements;
  constexpr int kPieces = kHeadDim / 8;  // 16-byte pieces of a row

  const int tiles = ceil_div(p.top_k, kTileN);
  const int tiles_per_split = ceil_div(tiles, p.num_splits);
  const int first_tile = split * tiles_per_split + warp;
  const int end_tile = min(tiles, (split + 1) * tiles_per_split);
  // The index that this lane looks at of a tile.
  const auto index_of = [&](int tile) {
    const int i = tile * kTileN + lane % kTileN;
    return tile < end_tile && i < p.top_k ? indices[i] : -1;
  };
  const T* q = static_cast<const T*>(p.q) + batch_idx * p.q_batch_stride + j * p.q_token_stride +
               first_head * p.q_head_stride;
  for (int i = threadIdx.x; i < kTileM * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    cp_async_16(q_tile + row * Tile::kPitch + piece * 8,
                row < num_rows_m ? q + row * p.q_head_stride + piece * 8 : p.q, row < num_rows_m);
  }
  cp_async_commit();

  const RowLocator locator(p, batch_idx, kv_head_idx,
                           visible_len(seq_len_of(p.table, batch_idx), p.q_len, j));
  if (p.queries_are_ready) wait_for_previous_kernel();
  let_next_kernel_launch();
  int first_indices[kMaxStages];
#pragma unroll
  for (int s = 0; s < kMaxStages; ++s) {
    first_indices[s] = s < p.stages ? index_of(first_tile + s * kWarps) : -1;
  }

  // Starts the copy of a tile's rows and returns which of the 16 are valid.
  const auto fetch = [&](int index, int stage) -> unsigned {
    int64_t my_k_offset, my_v_offset;
    const bool found = locator.find(index, my_k_offset, my_v_offset);
    const unsigned valid_rows = __ballot_sync(kFullMask, found) & 0xffffu;
    if (valid_rows != 0) {
      T* k_tile = stages + stage * 2 * Tile::kElements;
      T* v_tile = k_tile + Tile::kElements;
#pragma unroll 4
      for (int i = lane; i < kTileN * kPieces; i += kWarpSize) {
        const int row = i / kPieces, piece = i % kPieces;
        const int64_t k_offset = __shfl_sync(kFullMask, my_k_offset, row);
        const int64_t v_offset = __shfl_sync(kFullMask, my_v_offset, row);
        const bool valid = valid_rows >> row & 1u;
        const int to = row * Tile::kPitch + piece * 8;
        cp_async_16(k_tile + to, static_cast<const T*>(p.cache.k) + k_offset + piece * 8, valid);
        cp_async_16(v_tile + to, static_cast<const T*>(p.cache.v) + v_offset + piece * 8, valid);
      }
    }
    cp_async_commit();
    return valid_rows;
  };

  uint64_t valid_rows = 0;  // 16 bits a stage
#pragma unroll
  for (int s = 0; s < kMaxStages; ++s) {
    if (s < p.stages) valid_rows |= uint64_t{fetch(first_indices[s], s)} << s * 16;
  }
  int next_index = index_of(first_tile + p.stages * kWarps);
  wait_for_oldest(p.stages + 1);  // the queries
  __syncthreads();                // every thread's part of the queries is there
  Accumulator<kHeadDim> acc;
  const float scale_log2 = p.softmax_scale * kLog2E;
  for (int tile = first_tile, stage = 0; tile < end_tile; tile += kWarps) {
    wait_for_oldest(p.stages);
    __syncwarp();
    const unsigned valid = valid_rows >> stage * 16 & 0xffffu;
    if (valid != 0) {
      const T* k_tile = stages + stage * 2 * Tile::kElements;
      attend_tile<T, kHeadDim>(acc, q_tile, k_tile, k_tile + Tile::kElements, valid, scale_log2);
    }
    __syncwarp();
    valid_rows &= ~(uint64_t{0xffff} << stage * 16);
    valid_rows |= uint64_t{fetch(next_index, stage)} << stage * 16;
    next_index = index_of(tile + (p.stages + 1) * kWarps);
    stage = stage + 1 == p.stages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  __syncthreads();

  const Partials<kHeadDim, kWarps> partials(shared + Tile::kQueryBytes);
  partials.store(acc, num_rows_m);
  __syncthreads();

  const int64_t num_rows = int64_t{p.table.batch} * p.q_len * p.num_heads;
  const int64_t first_row = token * p.num_heads + first_head;
  const auto write = [&](int64_t row, int d, const MergedElement& merged) {
    const bool empty = merged.sum == 0.0f;
    static_cast<T*>(p.out)[row * kHeadDim + d] =
        static_cast<T>(empty ? 0.0f : merged.out / merged.sum);
    if (d == 0) p.lse[row] = empty ? -INFINITY : (merged.max + log2f(merged.sum)) * kLn2;
  };
  const auto place = [](int part, int m, int d) {
    return (part * kTileM + m) * Tile::kPartialPitch + d;
  };
#if __CUDA_ARCH__ >= 900
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  const Received received(shared + Tile::received_offset(kWarps, p.stages), p.num_splits,
                          num_rows_m);
  const int share = Tile::share_of_block(p.num_splits, num_rows_m);
  if (p.is_cluster) wait_at_cluster_barrier();  // every block has begun
#endif
  for (int i = threadIdx.x; i < num_rows_m * kHeadDim; i += kThreads) {
    const int m = i / kHeadDim, d = i % kHeadDim;
    const MergedElement merged = merge_parts<kWarps>(kWarps, [&](int w) -> MergedElement {
      return {partials.max[w * kTileM + m], partials.sum[w * kTileM + m],
              partials.out[place(w, m, d)]};
    });
    if (p.num_splits == 1) {
      write(first_row + m, d, merged);
#if __CUDA_ARCH__ >= 900
    } else if (p.is_cluster) {
      cluster.map_shared_rank(received.out, i / share)[split * share + i % share] = merged.out;
      if (d < p.num_splits) {
        cluster.map_shared_rank(received.max, d)[split * num_rows_m + m] = merged.max;
        cluster.map_shared_rank(received.sum, d)[split * num_rows_m + m] = merged.sum;
      }
#endif
    } else {
      const int64_t row = split * num_rows + first_row + m;
      const bool empty = merged.sum == 0.0f;
      p.out_partial[row * kHeadDim + d] = empty ? 0.0f : merged.out / merged.sum;
      if (d == 0) {
        p.lse_partial[row] = empty ? -INFINITY : (merged.max + log2f(merged.sum)) * kLn2;
      }
    }
  }
#if __CUDA_ARCH__ >= 900
  if (!p.is_cluster) return;
  cluster.sync();  // all was sent, and nothing is read from other blocks
  for (int j = threadIdx.x; j < share && split * share + j < num_rows_m * kHeadDim; j += kThreads) {
    const int m = (split * share + j) / kHeadDim, d = (split * share + j) % kHeadDim;
    write(first_row + m, d, merge_parts<kMaxCluster>(p.num_splits, [&](int block) -> MergedElement {
            return {received.max[block * num_rows_m + m], received.sum[block * num_rows_m + m],
                    received.out[block * share + j]};
          }));
  }
#endif
}

// grid: batch * q_len * num_heads, one thread an element: merges the splits of a row.
template <typename T>
__global__ void combine_splits_kernel(const __grid_constant__ GatherParams p) {
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
auto kernel_of(int warps) {
  return warps == kManyWarps ? gather_attention_kernel<T, kHeadDim, kManyWarps>
                             : gather_attention_kernel<T, kHeadDim, kFewWarps>;
}

template <typename T, int kHeadDim>
void launch(const GatherAttentionParams& params, CudaStream stream) {
  constexpr const char* kOp = "hata::gather_attention";
  GatherParams p{params};
  const int64_t pairs = int64_t{p.table.batch} * p.q_len * p.cache.num_kv_heads;
  const int tiles_m = ceil_div(p.num_heads / p.cache.num_kv_heads, kTileM);
  if (pairs == 0) return;
  GatherShape shape{kFewWarps, p.num_splits};
  if (p.may_use_clusters && compiled_for_clusters(kernel_of<T, kHeadDim>(kFewWarps), kOp)) {
    shape = choose_gather_shape<kHeadDim>(kernel_of<T, kHeadDim>, pairs * tiles_m, p.top_k,
                                          rows_of(p), kOp);
    p.num_splits = shape.splits;
    p.is_cluster = p.num_splits > 1;
  }
  const auto kernel = kernel_of<T, kHeadDim>(shape.warps);
  p.stages = stages_for(p.top_k, shape);
  const auto shared_bytes = [&] {
    return Tile<kHeadDim>::shared_bytes(shape.warps, p.stages, p.is_cluster ? p.num_splits : 1,
                                        rows_of(p));
  };
  while (p.stages > 1 && !allow_shared_memory(kernel, shared_bytes(), kOp)) --p.stages;
  launch_kernel(kernel,
                {.grid = dim3(static_cast<unsigned>(pairs * p.num_splits), tiles_m),
                 .threads = shape.warps * kWarpSize,
                 .shared_bytes = shared_bytes(),
                 .cluster_size = p.is_cluster ? p.num_splits : 1,
                 .overlaps_previous = true},
                stream, kOp, p);
  if (p.num_splits == 1 || p.is_cluster) return;
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
