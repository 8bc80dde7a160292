#include "gather_attention.h"

#include <array>
#include <optional>

#include "cuda/attention/merge.cuh"
#include "cuda/attention/rows.cuh"
#include "cuda/attention/shape.cuh"
#include "cuda/primitives/cluster.cuh"
#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/memo.h"
#include "dispatch.h"

namespace hata {
namespace {

struct GatherParams : GatherAttentionParams {
  int stages;       // tiles in flight a warp
  bool is_cluster;  // the splits of a block's queries are one cluster, which combines them

  __device__ int num_parts(int64_t) const { return num_splits; }
};

// grid: (batch * q_len * num_kv_heads * num_splits, ceil_div(group, 8 kHeadTiles)). A block attends
// over one split of the selected rows for up to 8 or 16 query heads of a group. Each warp takes
// every kWarps-th tile of 16 rows and runs by itself; the block then merges its warps, and each
// block of a cluster its share of what all of them send.
template <typename T, int kHeadDim, int kWarps, int kHeadTiles>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks)
    gather_attention_kernel(const __grid_constant__ GatherParams p) {
  constexpr int kThreads = kWarps * kWarpSize;
  constexpr int kHeads = kHeadTiles * kTileHeads;
  using Layout = GatherLayout<T, kHeadDim, kHeadTiles>;
  extern __shared__ __align__(16) char shared[];
  __shared__ ArrivalBarrier results_arrived;  // of a cluster
  if constexpr (kIsSm90) {
    if (threadIdx.x == 0) results_arrived.init();
  }
  if (p.is_cluster) arrive_at_cluster_barrier();
  if (!p.queries_are_ready) wait_for_previous_kernel();
  const int warp = threadIdx.x / kWarpSize;
  const int split = blockIdx.x % p.num_splits;
  const int64_t pair = blockIdx.x / p.num_splits;
  const int num_kv_heads = p.cache.num_kv_heads, group_size = group_of(p);
  const int kv_head_idx = pair % num_kv_heads;
  const int64_t token = pair / num_kv_heads;  // of batch * q_len
  const int batch_idx = token / p.q_len, j = token % p.q_len;
  const int first_head = kv_head_idx * group_size + blockIdx.y * kHeads;
  const int num_heads = min(kHeads, (kv_head_idx + 1) * group_size - first_head);

  using Query = Operand<T>;  // or as large
  Query* queries = reinterpret_cast<Query*>(shared);
  const Query* q = static_cast<const Query*>(p.q) + batch_idx * p.q_batch_stride +
                   j * p.q_token_stride + first_head * p.q_head_stride;
  load_queries<Query, kHeadDim>(
      queries, [&](int head) { return q + head * p.q_head_stride; }, num_heads, kHeads);
  cp_async_commit();

  const RowList list{.batch_idx = batch_idx,
                     .kv_head_idx = kv_head_idx,
                     .visible = visible_len(seq_len_of(p.table, batch_idx), p.q_len, j),
                     .only_page = only_page(p.table, batch_idx),
                     .num_positions = p.top_k,
                     .positions = p.indices + pair * p.top_k};
  if (p.queries_are_ready) wait_for_previous_kernel();
  let_next_kernel_launch();
  const int tiles = ceil_div(p.top_k, kTileRows);
  const int tiles_per_split = ceil_div(tiles, p.num_splits);
  RowStream<T, kHeadDim, kHeadTiles, Layout::kMostStages> stream(
      RowLocator<T, false>(p, list),
      {.first = split * tiles_per_split + warp,
       .step = kWarps,
       .end = min(tiles, (split + 1) * tiles_per_split),
       .stages = reinterpret_cast<T*>(shared + Layout::kQueryBytes +
                                      warp * p.stages * Tile<T, kHeadDim>::kStageBytes),
       .num_stages = p.stages});
  stream.wait_for_earlier_copies();
  __syncthreads();  // every thread's part of the queries is there
  prepare_queries<T, kHeadDim>(queries, kHeads, p.dtype);
  Accumulator<kHeadDim, kHeadTiles> acc;
  stream.run(acc, queries, LogitScale(p, k_scale_of_rows<T>(p.cache, kv_head_idx)));
  __syncthreads();  // every warp has read its tiles, whose place the results take

  const Partials partials(shared + Layout::kQueryBytes, kWarps, num_heads, kHeadDim);
  partials.store<T>(acc, v_scale_of_rows<T>(p.cache, kv_head_idx), warp);
  __syncthreads();
  partials.weigh();
  __syncthreads();

  const int64_t first_query = token * p.num_heads + first_head;
  if constexpr (kIsSm90) {
    if (p.is_cluster) {
      wait_at_cluster_barrier();  // every block has begun
      const Received received(results_arrived, shared + Layout::received_offset(kWarps, p.stages),
                              p.num_splits, num_heads);
      merge_blocks(p, split, p.num_splits, partials, received, first_query, num_heads);
      return;
    }
  }
  const int64_t first_part = split * num_queries_of(p) + first_query;
  for (int i = threadIdx.x; i < num_heads * kHeadDim; i += kThreads) {
    const int head = i / kHeadDim, d = i % kHeadDim;
    const AttentionState state = partials.state(head);
    const float out = partials.out(head, d);
    if (p.num_splits == 1) {
      write_result(p, first_query + head, kHeadDim, d, state, out);
    } else {
      write_part<kHeadDim>(p, first_part + head, d, state, out);
    }
  }
}

template <typename T, int kHeadDim, int kHeadTiles>
auto kernel_of(int warps) {
  constexpr int kFewWarps = few_warps(kHeadDim);
  return warps == kFewWarps ? gather_attention_kernel<T, kHeadDim, kFewWarps, kHeadTiles>
                            : gather_attention_kernel<T, kHeadDim, 2 * kFewWarps, kHeadTiles>;
}

template <typename T, int kHeadDim, int kHeadTiles>
void launch(const GatherAttentionParams& params, CudaStream stream) {
  constexpr const char* kOp = "hata::gather_attention";
  using Layout = GatherLayout<T, kHeadDim, kHeadTiles>;
  const auto kernel_of_warps = kernel_of<T, kHeadDim, kHeadTiles>;
  GatherParams p{params};
  const int64_t pairs = int64_t{p.table.batch} * p.q_len * p.cache.num_kv_heads;
  const int group_size = group_of(p);
  const int head_blocks = ceil_div(group_size, kHeadTiles * kTileHeads);
  const int heads = std::min(group_size, kHeadTiles * kTileHeads);
  if (pairs == 0) return;
  constexpr int kFewWarps = few_warps(kHeadDim);
  GatherShape shape{kFewWarps, p.num_splits};
  if (p.may_use_clusters) {
    const int64_t clusters = pairs * head_blocks;
    // The device is asked once for each shape: that is slow.
    static Memo<std::array<int64_t, 4>, std::optional<GatherShape>> remembered;
    const std::optional<GatherShape> chosen =
        remembered.get({current_device(kOp), clusters, p.top_k, heads}, [&] {
          return choose_gather_shape<Layout>(kernel_of_warps, kFewWarps, clusters, p.top_k, heads,
                                             kOp);
        });
    if (chosen) {
      shape = *chosen;
      p.num_splits = shape.splits;
      p.is_cluster = p.num_splits > 1;
    }
  }
  const auto kernel = kernel_of_warps(shape.warps);
  p.stages = Layout::stages_for(p.top_k, shape);
  const auto shared_bytes = [&] {
    return Layout::bytes(shape.warps, p.stages, p.is_cluster ? p.num_splits : 1, heads);
  };
  while (p.stages > 1 && !allow_shared_memory(kernel, shared_bytes(), kOp)) --p.stages;
  launch_kernel(kernel,
                {.grid = dim3(static_cast<unsigned>(pairs * p.num_splits), head_blocks),
                 .threads = shape.warps * kWarpSize,
                 .shared_bytes = shared_bytes(),
                 .cluster_size = p.is_cluster ? p.num_splits : 0,
                 .overlaps_previous = true},
                stream, kOp, p);
  if (p.num_splits > 1 && !p.is_cluster) combine_splits(p, stream, kOp);
}

}  // namespace

void gather_attention_cuda(const GatherAttentionParams& p, CudaStream stream) {
  const bool few_heads = group_of(p) <= kTileHeads;
  dispatch_row_dtype(p.cache.dtype, [&]<typename T>() {
    dispatch_int<64, 96, 128, 192, 256, 512>("head_dim", p.cache.head_dim, [&](auto head_dim) {
      // Of 512 channels a warp has registers for eight heads.
      if constexpr (head_dim <= 256) {
        if (!few_heads) return launch<T, head_dim, 2>(p, stream);
      }
      launch<T, head_dim, 1>(p, stream);
    });
  });
}

}  // namespace hata
