#include "cuda/score_select_cluster.h"

#include <cooperative_groups.h>

#include "cuda/block_scan.cuh"
#include "cuda/code_scan.cuh"
#include "cuda/launch.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kThreads = 384;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 2;  // the selection of one block overlaps with the scan of another
constexpr int kMaxCluster = 8;   // the largest that every GPU with clusters schedules
constexpr int kHistogramBins = 8192;  // of all query tokens together: 32 KB
constexpr int kFineBins = 64;         // of the second histogram, one query token at a time
constexpr int kSharedKeys =
    32 * 1024;  // keys of a block in shared memory, 64 KB; more go to the workspace

// How 16-bit keys become bins: key >> shift, and where shift > 0 a second histogram of the low bits
// of the keys in the bin at the cut.
struct Bins {
  int count;
  int shift;
};

Bins bins_for(const ScoreSelectParams& p) {
  const int keys = p.code_cache.norms != nullptr
                       ? 1 << 16
                       : p.weight_sum * p.code_cache.num_words * kWordBits + 1;
  Bins bins{keys, 0};
  while (bins.count * p.q_len > kHistogramBins) {
    ++bins.shift;
    bins.count = ((keys - 1) >> bins.shift) + 1;
  }
  return bins;
}

struct Shared {
  uint32_t planes[kMaxClusterTokens * kMaxPlanes * kMaxWords];
  uint32_t histogram[kHistogramBins];  // [q_len, bins]
  uint32_t fine[kFineBins];
  uint32_t warp_above[kWarps], warp_ties[kWarps];
  uint32_t cut_bin, cut_above, cut_ties, cut_ties_before, above_before;
  alignas(16) uint16_t keys[kSharedKeys];  // [q_len, slice]
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace cg = cooperative_groups;

constexpr int kSliceAlignment = 256;  // positions: what a warp looks at in one step

// The bin that holds the `wanted`-th largest key of the cluster, and what the ordered output needs:
// how many keys of the cluster lie in higher bins, and of the blocks before this one how many in
// higher bins and how many in that bin.
struct Cut {
  uint32_t bin;
  uint32_t above, ties;
  uint32_t above_before, ties_before;
};

// histogram points at the same histogram in each block's shared memory. Every block of the cluster
// calls it after a cluster barrier that follows the last count.
__device__ Cut find_cut(const cg::cluster_group& cluster, Shared& shared, uint32_t* histogram,
                        int num_bins, uint32_t wanted) {
  const int rank = cluster.block_rank(), num_blocks = cluster.num_blocks();
  const int per_thread = ceil_div(num_bins, kThreads);
  // Thread t looks at per_thread bins, thread 0 at the highest.
  const int last = num_bins - 1 - static_cast<int>(threadIdx.x) * per_thread;
  const int first = max(last - per_thread + 1, 0);
  uint32_t total = 0, before = 0;
  for (int bin = last; bin >= first; --bin) {
#pragma unroll 4
    for (int block = 0; block < num_blocks; ++block) {
      const uint32_t count = cluster.map_shared_rank(histogram, block)[bin];
      total += count;
      if (block < rank) before += count;
    }
  }
  uint32_t all;
  const uint32_t above = block_exclusive_scan<kThreads>(total, all);
  const uint32_t above_before = block_exclusive_scan<kThreads>(before, all);
  if (above < wanted && wanted <= above + total) {
    uint32_t bin_above = above, bin_above_before = above_before;
    for (int bin = last; bin >= first; --bin) {
      uint32_t bin_total = 0, bin_before = 0;
#pragma unroll 1
      for (int block = 0; block < num_blocks; ++block) {
        const uint32_t count = cluster.map_shared_rank(histogram, block)[bin];
        bin_total += count;
        if (block < rank) bin_before += count;
      }
      if (wanted <= bin_above + bin_total) {
        shared.cut_bin = bin;
        shared.cut_above = bin_above;
        shared.cut_ties = bin_total;
        shared.above_before = bin_above_before;
        shared.cut_ties_before = bin_before;
        break;
      }
      bin_above += bin_total;
      bin_above_before += bin_before;
    }
  }
  __syncthreads();
  return {shared.cut_bin, shared.cut_above, shared.cut_ties, shared.above_before,
          shared.cut_ties_before};
}

// One block's positions of a (sequence, KV head).
struct Slice {
  int begin, end;  // absolute positions
  int pitch;       // keys from one query token's slice to the next
};

// Scores the slice for every query token: keys to key_rows[j], counts of the positions that compete
// (neither sink nor recent) to the histogram.
template <int kNumWords>
__device__ void scan_slice(const ScoreSelectParams& p, Shared& shared, const Slice& slice,
                           const Bins& bins, uint16_t* keys, int64_t key_pitch, int batch_idx,
                           int kv_head_idx, int seq_len) {
  // Codes narrower than 16 bytes are loaded several positions at a time where a page has as many.
  constexpr int kPerLoad = kNumWords == 1 ? 4 : (kNumWords == 2 ? 2 : 1);
  constexpr int kLoads = kNumWords <= 4 ? 4 : 2;
  constexpr int kCodes = kPerLoad * kLoads;
  const int num_planes = hata::num_planes(p.weight_sum);
  const CodeCache& cache = p.code_cache;
  const bool whole_loads = (p.table.page_mask + 1u) % kPerLoad == 0 &&
                           reinterpret_cast<uintptr_t>(cache.codes) % 16 == 0 &&
                           cache.code_page_stride % 4 == 0 && cache.code_head_stride % 4 == 0;
  const uint32_t* head_codes = cache.codes + kv_head_idx * cache.code_head_stride;
  const auto code_at = [&](int position) {
    const int page = page_of(p.table, batch_idx, position);
    return page < 0 ? nullptr
                    : head_codes + page * cache.code_page_stride +
                          int64_t{row_of(p.table, position)} * kNumWords;
  };

  for (int base = slice.begin + threadIdx.x * kPerLoad; base < slice.end;
       base += kThreads * kCodes) {
    Code<kNumWords> codes[kCodes] = {};
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int position = base + load * kThreads * kPerLoad;
      if (position >= slice.end) continue;
      if (kPerLoad == 1 || whole_loads) {
        const uint32_t* from = code_at(position);
        if (from == nullptr) continue;
        const Code<kPerLoad * kNumWords> wide = load_code<kPerLoad * kNumWords>(from);
#pragma unroll
        for (int i = 0; i < kPerLoad * kNumWords; ++i) {
          codes[load * kPerLoad + i / kNumWords].words[i % kNumWords] = wide.words[i];
        }
      } else {
        for (int i = 0; i < kPerLoad && position + i < slice.end; ++i) {
          const uint32_t* from = code_at(position + i);
          if (from != nullptr) codes[load * kPerLoad + i] = load_code<kNumWords>(from);
        }
      }
    }
    for (int j = 0; j < p.q_len; ++j) {
      int matches[kCodes];
      count_matches(codes, shared.planes + j * num_planes * kNumWords, num_planes, p.weight_sum,
                    matches);
      const int visible = visible_len(seq_len, p.q_len, j);
      const int first = p.num_sink, last = visible - p.num_recent;
#pragma unroll
      for (int i = 0; i < kCodes; ++i) {
        const int position = base + i / kPerLoad * kThreads * kPerLoad + i % kPerLoad;
        if (position < first || position >= min(last, slice.end)) continue;
        uint32_t key = matches[i];
        if (cache.norms != nullptr) {
          const int page = page_of(p.table, batch_idx, position);
          const uint16_t norm =
              page < 0
                  ? 0
                  : cache.norms[page * cache.norm_page_stride +
                                kv_head_idx * cache.norm_head_stride + row_of(p.table, position)];
          key = ordered_key_float16(
              float16_score(matches[i], p.weight_sum, kNumWords * kWordBits, norm));
        }
        keys[j * key_pitch + position - slice.begin] = static_cast<uint16_t>(key);
        atomicAdd(&shared.histogram[j * bins.count + (key >> bins.shift)], 1u);
      }
    }
  }
}

// Which of 8 neighbouring keys, the first at `position`, lie above the cut and which equal it, as
// bit masks over those that compete.
struct Masks {
  uint32_t above, ties;
};

__device__ Masks compare_keys(const uint16_t* keys, int position, int first, int last,
                              uint32_t cut) {
  const uint4 eight = *reinterpret_cast<const uint4*>(keys);
  const uint32_t pairs[] = {eight.x, eight.y, eight.z, eight.w};
  Masks masks = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t key = pairs[i / 2] >> (i % 2 * 16) & 0xffffu;
    masks.above |= static_cast<uint32_t>(key > cut) << i;
    masks.ties |= static_cast<uint32_t>(key == cut) << i;
  }
  const int skip = min(max(first - position, 0), 8), stop = min(max(last - position, 0), 8);
  const uint32_t competing = (0xffu << skip) & ((1u << stop) - 1u);
  return {masks.above & competing, masks.ties & competing};
}

// Writes the selected positions of this slice in order: those above the cut, and of the ties all
// but the first ties_to_skip of the cluster.
__device__ void write_slice(Shared& shared, const Slice& slice, const uint16_t* keys, int first,
                            int last, uint32_t cut_key, uint32_t above_before, uint32_t ties_before,
                            uint32_t ties_to_skip, int32_t* indices) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int steps = ceil_div(ceil_div(slice.end - slice.begin, kSliceAlignment), kWarps);
  const int begin = slice.begin + warp * steps * kSliceAlignment;
  const int end = min(begin + steps * kSliceAlignment, slice.end);

  uint32_t above = 0, ties = 0;
  for (int position = begin + lane * 8; position < end; position += kSliceAlignment) {
    const Masks masks =
        compare_keys(keys + position - slice.begin, position, first, min(last, end), cut_key);
    above += __popc(masks.above);
    ties += __popc(masks.ties);
  }
  above = __reduce_add_sync(kFullMask, above);
  ties = __reduce_add_sync(kFullMask, ties);
  if (lane == 0) {
    shared.warp_above[warp] = above;
    shared.warp_ties[warp] = ties;
  }
  __syncthreads();
  for (int w = 0; w < warp; ++w) {
    above_before += shared.warp_above[w];
    ties_before += shared.warp_ties[w];
  }

  for (int step = begin; step < end; step += kSliceAlignment) {
    const int position = step + lane * 8;
    Masks masks = {0, 0};
    if (position < end) {
      masks = compare_keys(keys + position - slice.begin, position, first, min(last, end), cut_key);
    }
    if (!__any_sync(kFullMask, (masks.above | masks.ties) != 0)) continue;
    const uint32_t counts = __popc(masks.above) | __popc(masks.ties) << 16;
    uint32_t inclusive = counts;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kFullMask, inclusive, offset);
      if (lane >= offset) inclusive += other;
    }
    const uint32_t before = inclusive - counts;
    uint32_t num_above = above_before + (before & 0xffffu);
    uint32_t num_ties = ties_before + (before >> 16);
    for (uint32_t rest = masks.above | masks.ties; rest != 0; rest &= rest - 1) {
      const int i = __ffs(rest) - 1;
      const bool tied = masks.ties >> i & 1u;
      if (!tied || num_ties >= ties_to_skip) {
        const uint32_t ties_selected = num_ties > ties_to_skip ? num_ties - ties_to_skip : 0;
        indices[num_above + ties_selected] = position + i;
      }
      num_above += !tied;
      num_ties += tied;
    }
    const uint32_t all = __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
    above_before += all & 0xffffu;
    ties_before += all >> 16;
  }
  __syncthreads();  // warp_above and warp_ties may be written again
}

// grid: batch * num_kv_heads clusters. Each block of a cluster scans one slice of the sequence,
// keeping 16-bit keys and a histogram of them; the cluster adds up its histograms, finds the key of
// the last selected position, and each block writes its part of the indices, in order.
template <int kNumWords>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    score_select_kernel(const __grid_constant__ ScoreSelectParams p, const Bins bins) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const cg::cluster_group cluster = cg::this_cluster();
  for (int i = threadIdx.x; i < p.q_len * bins.count; i += kThreads) shared.histogram[i] = 0;
  wait_for_previous_kernel();
  let_next_kernel_launch();
  const int rank = cluster.block_rank(), num_blocks = cluster.num_blocks();
  const int pair = blockIdx.x / num_blocks;
  const int batch_idx = pair / p.num_kv_heads, kv_head_idx = pair % p.num_kv_heads;
  const int seq_len = seq_len_of(p.table, batch_idx);
  const int thread_of_cluster = rank * kThreads + threadIdx.x;

  const int slice_len = ceil_div(ceil_div(seq_len, num_blocks), kSliceAlignment) * kSliceAlignment;
  Slice slice;
  slice.begin = min(rank * slice_len, seq_len);
  slice.end = min(slice.begin + slice_len, seq_len);
  const bool keys_shared = int64_t{slice_len} * p.q_len <= kSharedKeys;
  const auto row_of_token = [&](int j) {
    return (int64_t{batch_idx} * p.q_len + j) * p.num_kv_heads + kv_head_idx;
  };
  const int64_t key_pitch =
      keys_shared ? slice_len : p.num_kv_heads * key_row_pitch(p.table.capacity);
  uint16_t* keys = keys_shared
                       ? shared.keys
                       : p.keys + row_of_token(0) * key_row_pitch(p.table.capacity) + slice.begin;

  const int token_words = num_planes(p.weight_sum) * kNumWords;
  for (int i = threadIdx.x; i < p.q_len * token_words; i += kThreads) {
    shared.planes[i] = p.planes[row_of_token(i / token_words) * token_words + i % token_words];
  }
  __syncthreads();
  // A sequence whose tokens all are selected has nothing to compare.
  if (seq_len > p.top_k) {
    scan_slice<kNumWords>(p, shared, slice, bins, keys, key_pitch, batch_idx, kv_head_idx, seq_len);
  }
  cluster.sync();

  for (int j = 0; j < p.q_len; ++j) {
    const int64_t row = row_of_token(j);
    const int visible = visible_len(seq_len, p.q_len, j);
    const int num_selected = min(p.top_k, visible);
    int32_t* indices = p.indices + row * p.top_k;
    const int cluster_threads = num_blocks * kThreads;
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
    const uint32_t wanted = p.top_k - p.num_sink - p.num_recent;
    if (wanted == 0) continue;
    const int first = p.num_sink, last = visible - p.num_recent;
    const uint16_t* token_keys = keys + j * key_pitch;
    Cut cut = find_cut(cluster, shared, shared.histogram + j * bins.count, bins.count, wanted);
    uint32_t cut_key = cut.bin;
    if (bins.shift > 0) {
      const int fine_bins = 1 << bins.shift;
      for (int i = threadIdx.x; i < fine_bins; i += kThreads) shared.fine[i] = 0;
      __syncthreads();
      const int end = min(last, slice.end);
      for (int t = max(first, slice.begin) + static_cast<int>(threadIdx.x); t < end;
           t += kThreads) {
        const uint32_t key = token_keys[t - slice.begin];
        if (key >> bins.shift == cut.bin) atomicAdd(&shared.fine[key % fine_bins], 1u);
      }
      cluster.sync();
      const Cut fine = find_cut(cluster, shared, shared.fine, fine_bins, wanted - cut.above);
      cut_key = cut.bin << bins.shift | fine.bin;
      cut = {fine.bin, cut.above + fine.above, fine.ties, cut.above_before + fine.above_before,
             fine.ties_before};
      cluster.sync();  // the others have read these counts
    }
    const uint32_t ties_to_skip = cut.ties - (wanted - cut.above);
    write_slice(shared, slice, token_keys, first, last, cut_key, cut.above_before, cut.ties_before,
                ties_to_skip, indices + p.num_sink);
  }
  cluster.sync();  // no block may leave while another reads its histogram
}

#else

template <int kNumWords>
__global__ void score_select_kernel(const __grid_constant__ ScoreSelectParams, const Bins) {}

#endif

template <int kNumWords>
bool launch(const ScoreSelectParams& p, CudaStream stream) {
  constexpr const char* kOp = "hata::score_select";
  const auto kernel = score_select_kernel<kNumWords>;
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, kernel), kOp);
  if (attributes.ptxVersion < 90) return false;  // compiled for a GPU without clusters

  const int pairs = p.table.batch * p.num_kv_heads;
  const int resident = device_attribute(cudaDevAttrMultiProcessorCount, kOp) * kBlocksPerSm;
  int cluster_size = kMaxCluster;
  while (cluster_size > 1 && pairs * cluster_size > resident) cluster_size /= 2;
  launch_kernel(kernel,
                {.grid = dim3(pairs * cluster_size),
                 .threads = kThreads,
                 .shared_bytes = sizeof(Shared),
                 .cluster_size = cluster_size,
                 .overlaps_previous = true},
                stream, kOp, p, bins_for(p));
  return true;
}

}  // namespace

bool score_select_cluster(const ScoreSelectParams& p, CudaStream stream) {
  if (p.q_len > kMaxClusterTokens) return false;
  if (p.table.batch == 0 || p.num_kv_heads == 0 || p.q_len == 0) return true;
  bool launched = false;
  dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>("num_words", p.code_cache.num_words, [&](auto num_words) {
    launched = launch<num_words>(p, stream);
  });
  return launched;
}

}  // namespace hata
