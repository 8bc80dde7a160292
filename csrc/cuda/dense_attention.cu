#include "dense_attention.h"

#include "cuda/attention/merge.cuh"
#include "cuda/attention/rows.cuh"
#include "cuda/attention/shape.cuh"
#include "cuda/primitives/launch.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kPieceTiles = kMinRowsPerSplit / kTileRows;

struct DenseParams : DenseAttentionParams {
  int stages;  // tiles in flight a warp

  // How many splits wrote parts of a query's result, or 0 where its sequence is not ours.
  __device__ int num_parts(int64_t query_idx) const {
    const int seq_len = seq_len_of(table, query_idx / (int64_t{q_len} * num_heads));
    return seq_len < min_sparse_len ? split_sequence(seq_len, num_splits).used : 0;
  }
};

// grid: (batch * num_kv_heads * num_splits, ceil_div(q_len * group, 8 kColumnTiles)). A block
// attends over one split of a sequence for up to 8 or 16 columns: column c is query head c % group
// of the KV head's group, of query token c / group. Each warp takes every kWarps-th tile of 16 rows
// and runs by itself; the block then merges its warps. Splits past the sequence's end leave.
template <typename T, int kHeadDim, int kWarps, int kColumnTiles>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks)
    dense_attention_kernel(const __grid_constant__ DenseParams p) {
  constexpr int kColumns = kColumnTiles * kTileHeads;
  using Layout = GatherLayout<T, kHeadDim, kColumnTiles>;
  extern __shared__ __align__(16) char shared[];
  wait_for_previous_kernel();
  let_next_kernel_launch();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int split = blockIdx.x % p.num_splits;
  const int list_idx = blockIdx.x / p.num_splits;  // of batch * num_kv_heads
  const int batch_idx = list_idx / p.cache.num_kv_heads;
  const int kv_head_idx = list_idx % p.cache.num_kv_heads;
  const int seq_len = seq_len_of(p.table, batch_idx);
  const auto [pieces, used] = split_sequence(seq_len, p.num_splits);
  if (seq_len >= p.min_sparse_len || split >= used) return;

  const int group = group_of(p);
  const int first_column = blockIdx.y * kColumns;
  const int num_columns = min(kColumns, p.q_len * group - first_column);
  const auto token_of = [&](int column) { return (first_column + column) / group; };
  const auto head_of = [&](int column) {
    return kv_head_idx * group + (first_column + column) % group;
  };
  using Query = Operand<T>;  // or as large
  Query* queries = reinterpret_cast<Query*>(shared);
  const Query* q = static_cast<const Query*>(p.q) + batch_idx * p.q_batch_stride;
  load_queries<Query, kHeadDim>(
      queries,
      [&](int column) {
        return q + token_of(column) * p.q_token_stride + head_of(column) * p.q_head_stride;
      },
      num_columns, kColumns);
  cp_async_commit();

  const int visible = visible_len(seq_len, p.q_len, token_of(num_columns - 1));
  const RowList list{.batch_idx = batch_idx,
                     .kv_head_idx = kv_head_idx,
                     .visible = visible,
                     .only_page = only_page(p.table, batch_idx),
                     .num_positions = visible,
                     .positions = nullptr};
  const int tiles = ceil_div(visible, kTileRows), tiles_per_split = pieces * kPieceTiles;
  RowStream<T, kHeadDim, kColumnTiles, Layout::kMostStages, RowLocator<T, true>> stream(
      RowLocator<T, true>(p, list),
      {.first = split * tiles_per_split + warp,
       .step = kWarps,
       .end = min(tiles, (split + 1) * tiles_per_split),
       .stages = reinterpret_cast<T*>(shared + Layout::kQueryBytes +
                                      warp * p.stages * Tile<T, kHeadDim>::kStageBytes),
       .num_stages = p.stages});
  int seen[kColumnTiles][2];  // positions that this thread's columns see
#pragma unroll
  for (int m = 0; m < kColumnTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      seen[m][i] = visible_len(seq_len, p.q_len, token_of(m * kTileHeads + lane % 4 * 2 + i));
    }
  }
  stream.wait_for_earlier_copies();
  __syncthreads();  // every thread's part of the queries is there
  prepare_queries<T, kHeadDim>(queries, kColumns, p.dtype);
  Accumulator<kHeadDim, kColumnTiles> acc;
  stream.run(acc, queries, LogitScale(p, k_scale_of_rows<T>(p.cache, kv_head_idx)),
             [&](int position, int m, int i) { return position < seen[m][i]; });
  __syncthreads();  // every warp has read its tiles, whose place the results take

  const Partials partials(shared + Layout::kQueryBytes, kWarps, num_columns, kHeadDim);
  partials.store<T>(acc, v_scale_of_rows<T>(p.cache, kv_head_idx), warp);
  __syncthreads();
  partials.weigh();
  __syncthreads();
  for (int i = threadIdx.x; i < num_columns * kHeadDim; i += kWarps * kWarpSize) {
    const int column = i / kHeadDim, d = i % kHeadDim;
    const int64_t token = int64_t{batch_idx} * p.q_len + token_of(column);
    const int64_t query_idx = token * p.num_heads + head_of(column);
    const AttentionState state = partials.state(column);
    if (used == 1) {
      write_result(p, query_idx, kHeadDim, d, state, partials.out(column, d));
    } else {
      const int64_t part = split * num_queries_of(p) + query_idx;
      write_part<kHeadDim>(p, part, d, state, partials.out(column, d));
    }
  }
}

template <typename T, int kHeadDim, int kColumnTiles>
void launch(const DenseAttentionParams& params, CudaStream stream) {
  constexpr const char* kOp = "hata::dense_attention";
  using Layout = GatherLayout<T, kHeadDim, kColumnTiles>;
  constexpr int kWarps = few_warps(kHeadDim);
  const auto kernel = dense_attention_kernel<T, kHeadDim, kWarps, kColumnTiles>;
  if (num_queries_of(params) == 0) return;
  DenseParams p{params, Layout::kMostStages};
  const auto shared_bytes = [&] { return Layout::bytes(kWarps, p.stages, 1, kMaxColumns); };
  while (p.stages > 1 && !allow_shared_memory(kernel, shared_bytes(), kOp)) --p.stages;
  const int64_t lists = int64_t{p.table.batch} * p.cache.num_kv_heads;
  const int columns = p.q_len * group_of(p);
  launch_kernel(kernel,
                {.grid = dim3(static_cast<unsigned>(lists * p.num_splits),
                              ceil_div(columns, kColumnTiles * kTileHeads)),
                 .threads = kWarps * kWarpSize,
                 .shared_bytes = shared_bytes(),
                 .overlaps_previous = true},
                stream, kOp, p);
  if (p.num_splits > 1) combine_splits(p, stream, kOp);
}

}  // namespace

void dense_attention_cuda(const DenseAttentionParams& p, CudaStream stream) {
  const bool few_columns = p.q_len * group_of(p) <= kTileHeads;
  dispatch_row_dtype(p.cache.dtype, [&]<typename T>() {
    dispatch_int<64, 96, 128, 192, 256, 512>("head_dim", p.cache.head_dim, [&](auto head_dim) {
      // Of 512 channels a warp has registers for eight columns.
      if constexpr (head_dim <= 256) {
        if (!few_columns) return launch<T, head_dim, 2>(p, stream);
      }
      launch<T, head_dim, 1>(p, stream);
    });
  });
}

}  // namespace hata
