#include "cuda/score_select_cluster.h"

#include "cuda/cluster_barrier.cuh"
#include "cuda/cluster_encode.cuh"
#include "cuda/cluster_scan.cuh"
#include "cuda/cluster_shape.cuh"
#include "cuda/launch.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kMaxGridY = 65535;  // KV heads

Bins bins_for(const ScoreSelectParams& p) {
  const int keys = p.code_cache.norms != nullptr
                       ? 1 << 16
                       : p.weight_sum * p.code_cache.num_words * kWordBits + 1;
  Bins bins{keys, 0};
  while ((bins.count = ceil_div(ceil_div(keys, 1 << bins.shift), kGroupBins) * kGroupBins) *
             p.q_len >
         kHistogramBins) {
    ++bins.shift;
  }
  return bins;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace cg = cooperative_groups;

__device__ __forceinline__ int cluster_idx() {
  int x;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(x));
  return x;
}

// The planes of all query tokens, in shared memory as the scan reads them.
template <int kNumWords>
__device__ void prepare_planes(const ClusterParams& params, ClusterShared& shared,
                               const EncodeTask& task, const EncodeScratch& scratch) {
  const ScoreSelectParams& p = params.select;
  const int num_planes = hata::num_planes(p.weight_sum);
  const int token_words = num_planes * kNumWords;
  const int pitch = padded_planes(num_planes) * kNumWords;
  if (!params.encodes) {
    for (int i = threadIdx.x; i < p.q_len * token_words; i += blockDim.x) {
      const int j = i / token_words, word = i % token_words;
      const int64_t row =
          (int64_t{task.batch_idx} * p.q_len + j) * p.num_kv_heads + task.kv_head_idx;
      shared.planes[j * pitch + word] = p.planes[row * token_words + word];
    }
  } else if (params.encode.dtype == DType::kBFloat16) {
    encode<__nv_bfloat16>(task, scratch, shared.largest, shared.bases, shared.planes, pitch,
                          shared.new_tokens);
  } else {
    encode<__half>(task, scratch, shared.largest, shared.bases, shared.planes, pitch,
                   shared.new_tokens);
  }
  __syncthreads();
  if (params.encodes) return;
  const int warp = threadIdx.x / kWarpSize;
  static_assert(kMaxClusterTokens <= kFewThreads / kWarpSize);
  if (warp < p.q_len) {
    shared.bases[warp] = plane_base<kNumWords>(shared.planes + warp * pitch, p.weight_sum);
  }
  __syncthreads();
}

// grid: (batch clusters, num_kv_heads). Each block of a cluster scans one slice of the sequence,
// keeping 16-bit keys and a histogram of them; the cluster adds up its histograms, finds the key of
// the last selected position, and each block writes its part of the indices, in order.
template <int kNumWords, bool kNorms>
__global__ void __launch_bounds__(kManyThreads, 1)
    score_select_kernel(const __grid_constant__ ClusterParams params) {
  extern __shared__ __align__(16) char shared_bytes[];
  ClusterShared& shared = *reinterpret_cast<ClusterShared*>(shared_bytes);
  const ScoreSelectParams& p = params.select;
  const Bins bins = params.bins;
  const cg::cluster_group cluster = cg::this_cluster();
  arrive_at_cluster_barrier();
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.q_len * bins.count; i += blockDim.x) shared.histogram[i] = 0;
  if (bins.shift > 0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.q_len * kFineBins; i += blockDim.x) shared.fine[i] = 0;
  }
  if (threadIdx.x < kMaxClusterTokens) shared.largest[threadIdx.x] = shared.bases[threadIdx.x] = 0;
  if (threadIdx.x < kMaxPlanes * kMaxWords) shared.no_planes[threadIdx.x] = 0;
  shared.weights.set(p.weight_sum, threadIdx.x);
  {
    const int rank = cluster.block_rank(), num_blocks = cluster.num_blocks();
    const int batch_idx = cluster_idx();
    const int kv_head_idx = blockIdx.y;
    const EncodeTask task{params.encode, params.append, batch_idx,
                          kv_head_idx,   params.group,  {rank, num_blocks}};
    const EncodeScratch scratch(shared_bytes + kKeyOffset, params.key_bytes, params.encode,
                                params.group);
    // Hash weights are older than the previous kernel (decode_step.h): they need not wait for it.
    if (params.encodes) load_pass(task, scratch, 0);
    wait_for_previous_kernel();
    let_next_kernel_launch();
    if (params.encodes) load_rows(task, scratch, shared.new_rows);
    const int seq_len = seq_len_of(p.table, batch_idx);
    const CodeReader<kNumWords> reader(p.table, p.code_cache, batch_idx, kv_head_idx);
    const int slice_len =
        ceil_div(ceil_div(seq_len, num_blocks), kSliceAlignment) * kSliceAlignment;
    ClusterSlice slice{.first_row = int64_t{batch_idx} * p.q_len * p.num_kv_heads + kv_head_idx,
                       .batch_idx = batch_idx,
                       .kv_head_idx = kv_head_idx,
                       .seq_len = seq_len,
                       .begin = min(rank * slice_len, seq_len)};
    slice.end = min(slice.begin + slice_len, seq_len);
    if (int64_t{slice_len} * p.q_len * 2 <= params.key_bytes) {
      slice.keys = reinterpret_cast<uint16_t*>(shared_bytes + kKeyOffset);
      slice.key_pitch = slice_len;
    } else {
      const int64_t pitch = key_row_pitch(p.table.capacity);
      slice.keys = p.keys + slice.first_row * pitch + slice.begin;
      slice.key_pitch = p.num_kv_heads * pitch;
    }
    if (threadIdx.x == 0) shared.slice = slice;
    // Memory works on the first codes while the planes are made.
    constexpr int kChunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords)>::kPositions;
    reader.template prefetch<kNorms, kChunk>(slice.begin + warp * kChunk, slice.end);
    prepare_planes<kNumWords>(params, shared, task, scratch);
  }
  // In shared memory, which leaves the scan its registers.
  const ClusterSlice& slice = shared.slice;
  // A sequence whose tokens all are selected has nothing to compare.
  if (slice.seq_len > p.top_k) {
    scan_slice<kNumWords, kNorms>(params, shared, slice);
  }
  __syncthreads();
  wait_at_cluster_barrier();  // every block has begun
  share_group_sums(cluster, shared.histogram, p.q_len * bins.count, shared.groups, kMaxGroups);
  cluster.sync();

  const int num_competing = p.top_k - p.num_sink - p.num_recent;
  const auto must_choose = [&](int j) {
    return visible_len(slice.seq_len, p.q_len, j) > p.top_k && num_competing > 0;
  };
  const int groups = bins.count / kGroupBins;
  if (warp < p.q_len && must_choose(warp)) {
    const Cut cut = find_cut(cluster, shared.histogram + warp * bins.count,
                             shared.groups + warp * groups, kMaxGroups, groups, num_competing);
    if (threadIdx.x % kWarpSize == 0) shared.cuts[warp] = cut;
  }
  // The last warps append meanwhile.
  if (params.encodes) {
    const ClusterShare share{static_cast<int>(cluster.block_rank()),
                             static_cast<int>(cluster.num_blocks())};
    if (params.encode.dtype == DType::kBFloat16) {
      write_new_tokens<__nv_bfloat16>(params.append, slice.kv_head_idx, share, shared.new_tokens,
                                      shared.new_rows);
    } else {
      write_new_tokens<__half>(params.append, slice.kv_head_idx, share, shared.new_tokens,
                               shared.new_rows);
    }
  }
  __syncthreads();
  const auto key_slice = [&](int j) -> KeySlice {
    return {slice.keys + j * slice.key_pitch, slice.begin, slice.end, p.num_sink,
            visible_len(slice.seq_len, p.q_len, j) - p.num_recent};
  };
  // The candidates of one token and one tile outlast the second histogram.
  const bool keeps_candidates = p.q_len == 1 && slice.end - slice.begin <= kBitmapPositions;
  if (bins.shift > 0) {
    for (int j = 0; j < p.q_len; ++j) {
      if (!must_choose(j)) continue;
      const uint32_t bin = shared.cuts[j].bin;
      for (int tile = slice.begin; tile < slice.end; tile += kBitmapPositions) {
        mark_candidates(shared.candidates, key_slice(j), tile, bin << bins.shift);
        __syncthreads();
        for_each_candidate(shared.candidates, key_slice(j), tile, [&](int, uint32_t key) {
          if (key >> bins.shift == bin) {
            atomicAdd(&shared.fine[j * kFineBins + key % (1u << bins.shift)], 1u);
          }
        });
        if (!keeps_candidates) __syncthreads();
      }
    }
    __syncthreads();
    share_group_sums(cluster, shared.fine, p.q_len * kFineBins, shared.fine_groups, kMaxFineGroups);
    cluster.sync();
    if (warp < p.q_len && must_choose(warp)) {
      const Cut coarse = shared.cuts[warp];
      const Cut fine =
          find_cut(cluster, shared.fine + warp * kFineBins,
                   shared.fine_groups + warp * (kFineBins / kGroupBins), kMaxFineGroups,
                   ceil_div(1 << bins.shift, kGroupBins), num_competing - coarse.above);
      __syncwarp();  // all lanes have read the coarse cut
      if (threadIdx.x % kWarpSize == 0) {
        shared.cuts[warp] = {coarse.bin << bins.shift | fine.bin, coarse.above + fine.above,
                             fine.ties, coarse.above_before + fine.above_before, fine.ties_before};
      }
    }
    __syncthreads();
  }
  // No block may leave while another reads its histogram; this one has read the others'. Nothing
  // was written that they wait for.
  arrive_at_cluster_barrier();

  const int thread_of_cluster = cluster.thread_rank();
  const int cluster_threads = cluster.num_threads();
  for (int j = 0; j < p.q_len; ++j) {
    const int64_t row = slice.first_row + j * p.num_kv_heads;
    const int visible = visible_len(slice.seq_len, p.q_len, j);
    const int num_selected = min(p.top_k, visible);
    int32_t* indices = p.indices + row * p.top_k;
    if (thread_of_cluster == 0) p.num_selected[row] = num_selected;
    for (int i = num_selected + thread_of_cluster; i < p.top_k; i += cluster_threads) {
      indices[i] = -1;
    }
    if (visible <= p.top_k) {
      for (int i = thread_of_cluster; i < visible; i += cluster_threads) indices[i] = i;
      continue;
    }
    // More positions than top_k: the sinks and the recent ones do not overlap.
    for (int i = thread_of_cluster; i < p.num_sink; i += cluster_threads) indices[i] = i;
    for (int i = thread_of_cluster; i < p.num_recent; i += cluster_threads) {
      indices[p.top_k - p.num_recent + i] = visible - p.num_recent + i;
    }
    if (num_competing == 0) continue;
    const Cut cut = shared.cuts[j];
    OutputCut output{cut.bin, cut.above_before, cut.ties_before,
                     cut.ties - (num_competing - cut.above)};
    for (int tile = slice.begin; tile < slice.end; tile += kBitmapPositions) {
      if (bins.shift == 0 || !keeps_candidates) {
        mark_candidates(shared.candidates, key_slice(j), tile, cut.bin);
        __syncthreads();
      }
      write_selected(shared.candidates, key_slice(j), tile, output, indices + p.num_sink);
      __syncthreads();  // the candidates may be marked again
    }
  }
  wait_at_cluster_barrier();
}

#else

template <int kNumWords, bool kNorms>
__global__ void score_select_kernel(const __grid_constant__ ClusterParams) {}

#endif

template <int kNumWords, bool kNorms>
bool launch(ClusterParams& params, CudaStream stream) {
  constexpr const char* kOp = "hata::score_select";
  const auto kernel = score_select_kernel<kNumWords, kNorms>;
  if (!compiled_for_clusters(kernel, kOp)) return false;
  allow_shared_memory(kernel, kKeyOffset + kMostKeyBytes, kOp);
  const ClusterShape shape = choose_shape(kernel, params.select, kOp);
  params.bins = bins_for(params.select);
  params.key_bytes = shape.key_bytes;
  launch_kernel(
      kernel,
      {.grid = dim3(params.select.table.batch * shape.cluster_size, params.select.num_kv_heads),
       .threads = shape.threads,
       .shared_bytes = kKeyOffset + shape.key_bytes,
       .cluster_size = shape.cluster_size,
       .overlaps_previous = true},
      stream, kOp, params);
  return true;
}

bool run(ClusterParams& params, CudaStream stream) {
  const ScoreSelectParams& p = params.select;
  if (p.q_len > kMaxClusterTokens) return false;
  if (p.num_kv_heads > kMaxGridY) return false;
  if (p.table.batch == 0 || p.num_kv_heads == 0 || p.q_len == 0) return true;
  bool launched = false;
  dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>("num_words", p.code_cache.num_words, [&](auto num_words) {
    launched = p.code_cache.norms != nullptr ? launch<num_words, true>(params, stream)
                                             : launch<num_words, false>(params, stream);
  });
  return launched;
}

}  // namespace

bool score_select_cluster(const ScoreSelectParams& p, CudaStream stream) {
  ClusterParams params{};
  params.select = p;
  return run(params, stream);
}

bool encode_score_select_cluster(const DecodeStepParams& p, CudaStream stream) {
  if (p.select.num_recent < p.select.q_len) return false;
  ClusterParams params{.select = p.select,
                       .encodes = true,
                       .encode = p.encode,
                       .append = p.append,
                       .group = p.encode.num_heads / p.encode.num_kv_heads};
  return run(params, stream);
}

}  // namespace hata
