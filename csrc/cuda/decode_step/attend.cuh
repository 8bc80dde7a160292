#pragma once

#include "cuda/attention/merge.cuh"
#include "cuda/decode_step/plan.cuh"

// The fifth phase: one block attends over the positions that it selected from its slice, and the
// blocks of the pair merge what they found. Rows take the place of ranks and histogram.
namespace hata::step {

// Attends over inputs.list and calls merge(what this block's warps found, their first query, how
// many), by a whole block. `rows` is attend_row_bytes() of shared memory.
template <typename T, int kHeadDim, typename Merge>
__device__ __forceinline__ void attend(const GatherAttentionParams& p, const AttendInputs& inputs,
                                       void* rows, const Merge& merge) {
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int group = p.num_heads / p.cache.num_kv_heads;
  const RowList& list = inputs.list;
  const int tiles = ceil_div(list.num_positions, kTileRows);
  RowStream<T, kHeadDim, 1, 1> stream(
      RowLocator<T, false>(p, list),
      {.first = warp,
       .step = num_warps,
       .end = tiles,
       .stages = static_cast<T*>(rows) + warp * 2 * Tile<kHeadDim>::kElements,
       .num_stages = 1});
  Accumulator<kHeadDim, 1> acc;
  // Columns past the group's queries hold anything: no column touches another's results.
  stream.run(acc, reinterpret_cast<const T*>(inputs.queries), PlainScale{p.softmax_scale * kLog2E});
  __syncthreads();  // every warp has read its rows, whose place the results take

  const int busy_warps = min(num_warps, tiles);
  const Partials<kHeadDim> partials(rows, busy_warps, group);
  if (warp < busy_warps) partials.store(acc);
  __syncthreads();
  partials.weigh();
  __syncthreads();

  merge.template operator()<T, kHeadDim>(
      partials, (int64_t{list.batch_idx} * p.cache.num_kv_heads + list.kv_head_idx) * group, group);
}

// Writes this block's share of the cluster's result, by a whole block.
template <typename T, int kHeadDim>
__device__ __forceinline__ void merge_cluster(const GatherAttentionParams& p, SharedPlan& shared,
                                              const Partials<kHeadDim>& partials,
                                              int64_t first_query, int group) {
  const Place& place = shared.slice.place;
  if (place.num_blocks > 1) {
    const Received received(shared.attend.results_arrived, shared.results, place.num_blocks, group);
    merge_blocks<T>(p, place.block, place.num_blocks, partials, received, first_query, group);
    return;
  }
  for (int i = threadIdx.x; i < group * kHeadDim; i += blockDim.x) {
    const int head = i / kHeadDim, d = i % kHeadDim;
    write_result<T, kHeadDim>(p, first_query + head, d, partials.state(head),
                              partials.out(head, d));
  }
}

// Attends over the list in the plan and calls merge() as attend() does, by a whole block.
template <typename Merge>
__device__ __forceinline__ void attend_selected(const GatherAttentionParams& p, SharedPlan& shared,
                                                const Merge& merge) {
  const auto call = [&]<typename T, int kHeadDim>() {
    attend<T, kHeadDim>(p, shared.attend, shared.histogram, merge);
  };
  const auto call_for_type = [&]<typename T>() {
    if (p.cache.head_dim == 128) return call.template operator()<T, 128>();
    if (p.cache.head_dim == 96) return call.template operator()<T, 96>();
    return call.template operator()<T, 64>();
  };
  p.cache.dtype == DType::kBFloat16 ? call_for_type.template operator()<__nv_bfloat16>()
                                    : call_for_type.template operator()<__half>();
}

}  // namespace hata::step
