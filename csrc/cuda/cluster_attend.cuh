#pragma once

#include "cuda/cluster_cut.cuh"
#include "cuda/cluster_output.cuh"
#include "cuda/gather_merge.cuh"

// How one block of a cluster attends over the positions that it selected from its slice.
namespace hata {

constexpr int kMaxAttendHeads = kTileHeads;  // query heads of a KV head
constexpr int kMaxAttendHeadDim = 128;

// A step with a softcap attends by gather_attention: a branch for it here costs every step
// (docs/kernels/log.md).
constexpr bool cluster_can_attend(const GatherAttentionParams& p) {
  return p.q_len == 1 && p.num_heads / p.cache.num_kv_heads <= kMaxAttendHeads &&
         p.cache.head_dim <= kMaxAttendHeadDim && p.softcap == 0.0f;
}

// What it needs of shared memory from before the selection on.
struct AttendShared {
  RowList list;
  ArrivalBarrier results_arrived;
  alignas(16) uint16_t queries[kMaxAttendHeads * (kMaxAttendHeadDim + 8)];
};

// Shared memory of a block for what the others send.
constexpr int kMaxResultBytes = Received::bytes(kMaxCluster, kMaxAttendHeads, kMaxAttendHeadDim);

// Shared memory of a block for rows.
constexpr int attend_row_bytes(int threads, int head_dim) {
  return threads / kWarpSize * 2 * kTileRows * (head_dim + 8) * 2;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// By a whole block: attends over shared.list, and writes its share of the cluster's result. `rows`
// is attend_row_bytes() of shared memory, `results` kMaxResultBytes.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend(const GatherAttentionParams& p, const ClusterPlace& place,
                                       AttendShared& shared, void* rows, void* results) {
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int group = p.num_heads / p.cache.num_kv_heads;
  const RowList& list = shared.list;
  const int tiles = ceil_div(list.num_positions, kTileRows);
  RowStream<T, kHeadDim, 1, 1> stream(
      RowLocator<T, false>(p, list),
      {.first = warp,
       .step = num_warps,
       .end = tiles,
       .stages = static_cast<T*>(rows) + warp * 2 * Tile<kHeadDim>::kElements,
       .num_stages = 1});
  Accumulator<kHeadDim, 1> acc;
  // Columns past the group's queries are not: theirs stay their own.
  stream.run(acc, reinterpret_cast<const T*>(shared.queries), PlainScale{p.softmax_scale * kLog2E});
  __syncthreads();  // every warp has read its rows, whose place the results take

  const int busy_warps = min(num_warps, tiles);
  const Partials<kHeadDim> partials(rows, busy_warps, group);
  if (warp < busy_warps) partials.store(acc);
  __syncthreads();
  partials.weigh();
  __syncthreads();

  const int64_t first_row =
      (int64_t{list.batch_idx} * p.cache.num_kv_heads + list.kv_head_idx) * group;
  if (place.num_blocks > 1) {
    const Received received(shared.results_arrived, results, place.num_blocks, group);
    merge_blocks<T>(p, place.rank, place.num_blocks, partials, received, first_row, group);
    return;
  }
  for (int i = threadIdx.x; i < group * kHeadDim; i += blockDim.x) {
    const int head = i / kHeadDim, d = i % kHeadDim;
    write_result<T, kHeadDim>(p, first_row + head, d, partials.max(head), partials.sum(head),
                              partials.out(head, d));
  }
}

#endif

}  // namespace hata
