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
  Partials(rows, busy_warps, group, kHeadDim)
      .store<T>(acc, v_scale_of_rows<T>(p.cache, list.kv_head_idx), warp);
}

// The rows of a list from one channel on.
template <typename T>
class ChannelLocator : public RowLocator<T, false> {
 public:
  __device__ ChannelLocator(const AttentionParams& p, const RowList& list, int first_channel)
      : RowLocator<T, false>(p, list), first_channel_(first_channel) {}

  __device__ const T* key(int page, int row) const {
    return RowLocator<T, false>::key(page, row) + first_channel_;
  }
  __device__ const T* value(int page, int row) const {
    return RowLocator<T, false>::value(page, row) + first_channel_;
  }

 private:
  int first_channel_;
};

// The same as attend() for more heads or channels than a warp has registers for. The warps of a
// team take the same tiles, each its channels of them: of the queries and keys, whose products the
// team adds up, and of the values and the output. So every row is read once.
template <typename T>
__device__ __forceinline__ void attend_in_teams(const GatherAttentionParams& p,
                                                const AttendInputs& inputs, const TeamPlan& plan,
                                                char* memory) {
  using Query = Operand<T>;
  using Tile = Tile<T, kTeamChannels>;
  constexpr int kQueryPitch = hata::Tile<Query, kTeamChannels>::kPitch;
  constexpr int kHeadTiles = kTeamHeads / kTileHeads;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int team = warp / plan.size, part = warp % plan.size;
  const int head_dim = p.cache.head_dim, group = group_of(p);
  const RowList& list = inputs.list;
  const auto first_channel_of = [&](int part) {
    return min(part * kTeamChannels, head_dim - kTeamChannels);
  };

  // The queries of one warp of a team after the other's. Channels that two of its warps have count
  // in the products of the first.
  const auto queries = reinterpret_cast<Query*>(memory + plan.queries);
  const Query* const q = static_cast<const Query*>(p.q) + list.batch_idx * p.q_batch_stride +
                         list.kv_head_idx * group * p.q_head_stride;
  constexpr int kPieces = kTeamChannels / 8;  // 16-byte pieces of a row
  for (int i = threadIdx.x; i < plan.size * kTeamHeads * kPieces; i += blockDim.x) {
    const int piece = i % kPieces, head = i / kPieces % kTeamHeads;
    const int of = i / (kPieces * kTeamHeads), channel = first_channel_of(of) + piece * 8;
    const bool counts = head < group && channel >= of * kTeamChannels;
    cp_async_16(queries + i / kPieces * kQueryPitch + piece * 8,
                q + (head < group ? head : 0) * p.q_head_stride + channel, counts);
  }
  cp_async_commit();

  const int tiles = ceil_div(list.num_positions, kTileRows);
  const int warp_elements = plan.stages * 2 * Tile::kElements;
  RowStream<T, kTeamChannels, kHeadTiles, kTeamStages, ChannelLocator<T>> stream(
      ChannelLocator<T>(p, list, first_channel_of(part)),
      {.first = team < plan.num_teams ? team : tiles,
       .step = plan.num_teams,
       .end = tiles,
       .stages = reinterpret_cast<T*>(memory + plan.rows) + warp * warp_elements,
       .num_stages = plan.stages});
  stream.wait_for_earlier_copies();
  __syncthreads();  // every thread's part of the queries is there
  prepare_queries<T, kTeamChannels>(queries, plan.size * kTeamHeads, p.dtype);

  // Adds up the products of a team, in the place of its warps' keys.
  const auto add_up = [&](float (&products)[kHeadTiles][4], T* keys) {
    static_assert(kHeadTiles * kWarpSize * sizeof(float4) <= Tile::kElements * sizeof(T));
    if (plan.size == 1) return;
    const auto wait_for_team = [&] {
      asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(plan.size * kWarpSize) : "memory");
    };
    __syncwarp();  // every lane has read its part of the keys
#pragma unroll
    for (int m = 0; m < kHeadTiles; ++m) {
      float (&mine)[4] = products[m];
      reinterpret_cast<float4*>(keys)[m * kWarpSize + lane] = {mine[0], mine[1], mine[2], mine[3]};
      for (float& product : mine) product = 0.0f;
    }
    wait_for_team();
#pragma unroll 1
    for (int other = 0; other < plan.size; ++other) {
      const T* const theirs = keys + (other - part) * warp_elements;
#pragma unroll
      for (int m = 0; m < kHeadTiles; ++m) {
        const float4 sum = reinterpret_cast<const float4*>(theirs)[m * kWarpSize + lane];
        products[m][0] += sum.x, products[m][1] += sum.y;
        products[m][2] += sum.z, products[m][3] += sum.w;
      }
    }
    wait_for_team();  // all have read them, and keys may take their place
  };
  Accumulator<kTeamChannels, kHeadTiles> acc;
  const float k_scale = k_scale_of_rows<T>(p.cache, list.kv_head_idx);
  stream.run(
      acc, queries + part * kTeamHeads * kQueryPitch,
      PlainScale{p.softmax_scale * k_scale * kLog2E}, [](int, int, int) { return true; }, add_up);
  __syncthreads();  // every warp has read its rows, whose place the results take

  const int busy_teams = min(plan.num_teams, tiles);
  if (team >= busy_teams) return;
  Partials(memory + plan.rows, busy_teams, group, head_dim)
      .store<T>(acc, v_scale_of_rows<T>(p.cache, list.kv_head_idx), team, first_channel_of(part));
}

// Writes this block's share of the cluster's result, by a whole block. The other blocks' shares
// arrive in `inbox`.
__device__ __forceinline__ void merge_cluster(const GatherAttentionParams& p, SharedPlan& shared,
                                              void* inbox, const Partials& partials,
                                              int64_t first_query, int group) {
  const Place& place = shared.slice.place;
  if (place.num_blocks > 1) {
    const Received received(shared.attend.results_arrived, inbox, place.num_blocks, group);
    merge_blocks(p, place.block, place.num_blocks, partials, received, first_query, group);
    return;
  }
  const int head_dim = partials.head_dim;
  for (int i = threadIdx.x; i < group * head_dim; i += blockDim.x) {
    const int head = i / head_dim, d = i % head_dim;
    write_result(p, first_query + head, head_dim, d, partials.state(head), partials.out(head, d));
  }
}

// Calls fn.template operator()<T>() with the type of the rows.
template <typename Fn>
__device__ __forceinline__ void with_row_type(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kFloat8E4M3:
      return fn.template operator()<__nv_fp8_e4m3>();
    case DType::kBFloat16:
      return fn.template operator()<__nv_bfloat16>();
    default:
      return fn.template operator()<__half>();
  }
}

// Weighs what the warps or teams of a block have found over a list, and calls merge(that, where
// other blocks' results arrive, its first query, how many), by a whole block.
template <typename Merge>
__device__ __forceinline__ void merge_found(const GatherAttentionParams& p, const RowList& list,
                                            const Partials& partials, void* inbox,
                                            const Merge& merge) {
  const int group = group_of(p);
  __syncthreads();  // every warp has stored
  partials.weigh();
  __syncthreads();
  merge(partials, inbox,
        (int64_t{list.batch_idx} * p.cache.num_kv_heads + list.kv_head_idx) * group, group);
}

// Attends over the list in the plan and merges as merge_found() says, by a whole block. Only the
// attention itself is there for each type of rows.
template <typename Merge>
__device__ __forceinline__ void attend_selected(const GatherAttentionParams& p, SharedPlan& shared,
                                                const Merge& merge) {
  const auto call = [&]<int kHeadDim>() {
    void* const rows = shared.histogram;
    with_row_type(p.cache.dtype,
                  [&]<typename T>() { attend<T, kHeadDim>(p, shared.attend, rows); });
    const RowList& list = shared.attend.list;
    const int busy_warps =
        min(static_cast<int>(blockDim.x) / kWarpSize, ceil_div(list.num_positions, kTileRows));
    merge_found(p, list, Partials(rows, busy_warps, group_of(p), kHeadDim), shared.results, merge);
  };
  if (p.cache.head_dim == 128) return call.template operator()<128>();
  if (p.cache.head_dim == 96) return call.template operator()<96>();
  return call.template operator()<64>();
}

// The same by teams of warps. The results of the cluster's other blocks have no room but where each
// block's histogram was: all must have selected before any of them sends.
template <typename Merge>
__device__ __forceinline__ void attend_selected_in_teams(const Params& params, SharedPlan& shared,
                                                         const Merge& merge) {
  const GatherAttentionParams& p = params.attend;
  const RowList& list = shared.attend.list;
  const TeamPlan& plan = params.teams;
  char* const memory = reinterpret_cast<char*>(shared.histogram);
  arrive_at_cluster_barrier();
  with_row_type(p.cache.dtype,
                [&]<typename T>() { attend_in_teams<T>(p, shared.attend, plan, memory); });
  wait_at_cluster_barrier();
  const int busy_teams = min(plan.num_teams, ceil_div(list.num_positions, kTileRows));
  merge_found(p, list, Partials(memory + plan.rows, busy_teams, group_of(p), p.cache.head_dim),
              memory, merge);
}

}  // namespace hata::step
