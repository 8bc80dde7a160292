#pragma once

#include "cuda/attention/merge.cuh"
#include "cuda/decode_step/plan.cuh"

// The fifth phase: one block attends over the positions that it selected from its slice, and the
// blocks of the pair merge what they found. Rows take the place of ranks and histogram.
namespace hata::step {

// Attends over inputs.list, and leaves what each warp finds where the rows were, by a whole block.
// `rows` is attend_row_bytes() of shared memory.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend(const GatherAttentionParams& p, AttendInputs& inputs,
                                       void* rows) {
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int group = p.num_heads / p.cache.num_kv_heads;
  const RowList& list = inputs.list;
  const int tiles = ceil_div(list.num_positions, kTileRows);
  constexpr int kStages = attend_stages(sizeof(T));
  RowStream<T, kHeadDim, 1, kStages> stream(
      RowLocator<T, false>(p, list),
      {.first = warp,
       .step = num_warps,
       .end = tiles,
       .stages = static_cast<T*>(rows) + warp * kStages * 2 * Tile<T, kHeadDim>::kElements,
       .num_stages = kStages});
  const auto queries = reinterpret_cast<Operand<T>*>(inputs.queries);
  prepare_queries<T, kHeadDim>(queries, group, p.dtype);
  Accumulator<kHeadDim, 1> acc;
  // Columns past the group's queries hold anything: no column touches another's results.
  const float k_scale = k_scale_of_rows<T>(p.cache, list.kv_head_idx);
  stream.run(acc, queries, PlainScale{p.softmax_scale * k_scale * kLog2E});
  __syncthreads();  // every warp has read its rows, whose place the results take

  const int busy_warps = min(num_warps, tiles);
  if (warp >= busy_warps) return;
  Partials<kHeadDim>(rows, busy_warps, group)
      .template store<T>(acc, v_scale_of_rows<T>(p.cache, list.kv_head_idx));
}

// Writes this block's share of the cluster's result, by a whole block.
template <int kHeadDim>
__device__ __forceinline__ void merge_cluster(const GatherAttentionParams& p, SharedPlan& shared,
                                              const Partials<kHeadDim>& partials,
                                              int64_t first_query, int group) {
  const Place& place = shared.slice.place;
  if (place.num_blocks > 1) {
    const Received received(shared.attend.results_arrived, shared.results, place.num_blocks, group);
    merge_blocks(p, place.block, place.num_blocks, partials, received, first_query, group);
    return;
  }
  for (int i = threadIdx.x; i < group * kHeadDim; i += blockDim.x) {
    const int head = i / kHeadDim, d = i % kHeadDim;
    write_result<kHeadDim>(p, first_query + head, d, partials.state(head), partials.out(head, d));
  }
}

// Attends over the list in the plan and calls merge(what this block's warps found, their first
// query, how many), by a whole block. Only the attention itself is there for each type of rows.
template <typename Merge>
__device__ __forceinline__ void attend_selected(const GatherAttentionParams& p, SharedPlan& shared,
                                                const Merge& merge) {
  const auto call = [&]<int kHeadDim>() {
    void* const rows = shared.histogram;
    switch (p.cache.dtype) {
      case DType::kFloat8E4M3:
        attend<__nv_fp8_e4m3, kHeadDim>(p, shared.attend, rows);
        break;
      case DType::kBFloat16:
        attend<__nv_bfloat16, kHeadDim>(p, shared.attend, rows);
        break;
      default:
        attend<__half, kHeadDim>(p, shared.attend, rows);
    }
    const RowList& list = shared.attend.list;
    const int group = p.num_heads / p.cache.num_kv_heads;
    const int busy_warps =
        min(static_cast<int>(blockDim.x) / kWarpSize, ceil_div(list.num_positions, kTileRows));
    const Partials<kHeadDim> partials(rows, busy_warps, group);
    __syncthreads();  // every warp has stored
    partials.weigh();
    __syncthreads();
    merge(partials, (int64_t{list.batch_idx} * p.cache.num_kv_heads + list.kv_head_idx) * group,
          group);
  };
  if (p.cache.head_dim == 128) return call.template operator()<128>();
  if (p.cache.head_dim == 96) return call.template operator()<96>();
  return call.template operator()<64>();
}

}  // namespace hata::step
