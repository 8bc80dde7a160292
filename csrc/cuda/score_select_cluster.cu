#include "cuda/score_select_cluster.h"

#include <cooperative_groups.h>

#include "cuda/block_scan.cuh"
#include "cuda/code_scan.cuh"
#include "cuda/launch.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kThreads = 768;
constexpr int kMaxCluster = 8;        // the largest that every GPU with clusters schedules
constexpr int kHistogramBins = 4096;  // of all query tokens together: 16 KB
constexpr int kFineBins = 128;        // of the second histogram, one query token at a time
// Keys of a block in shared memory; more go to the workspace.
constexpr int kSharedKeys = 64 * 1024;
constexpr int kBitmapPositions = 32 * 1024;  // compared with the cut at a time

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

// The bin that holds the `wanted`-th largest key of the cluster, and what the ordered output needs:
// how many keys of the cluster lie in higher bins, and of the blocks before this one how many in
// higher bins and how many in that bin.
struct Cut {
  uint32_t bin;
  uint32_t above, ties;
  uint32_t above_before, ties_before;
};

struct Shared {
  uint32_t planes[kMaxClusterTokens * kMaxPlanes * kMaxWords];
  uint32_t histogram[kHistogramBins];  // [q_len, bins]
  uint32_t fine[kFineBins];
  uint32_t above_bits[kBitmapPositions / 32], tie_bits[kBitmapPositions / 32];
  Cut cut;
  alignas(16) uint16_t keys[kSharedKeys];  // [q_len, slice]
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace cg = cooperative_groups;

constexpr int kSliceAlignment = 32;  // positions: a word of the bitmaps

// histogram points at the same histogram in each block's shared memory. Every block of the cluster
// calls it after a cluster barrier that follows the last count.
__device__ Cut find_cut(const cg::cluster_group& cluster, Shared& shared, uint32_t* histogram,
                        int num_bins, uint32_t wanted) {
  const int rank = cluster.block_rank(), num_blocks = cluster.num_blocks();
  // Sums one bin over the cluster, and over the blocks before this one.
  const auto sum_bin = [&](int bin, uint32_t& total, uint32_t& before) {
#pragma unroll 4
    for (int block = 0; block < num_blocks; ++block) {
      const uint32_t count = cluster.map_shared_rank(histogram, block)[bin];
      total += count;
      if (block < rank) before += count;
    }
  };
  // Thread t looks at per_thread bins, thread 0 at the highest.
  const int per_thread = ceil_div(num_bins, kThreads);
  const int last = num_bins - 1 - static_cast<int>(threadIdx.x) * per_thread;
  uint32_t total = 0, before = 0;
  for (int bin = last; bin >= 0 && bin > last - per_thread; --bin) sum_bin(bin, total, before);
  uint32_t all;
  const uint32_t above = block_exclusive_scan<kThreads>(total, all);
  const uint32_t above_before = block_exclusive_scan<kThreads>(before, all);
  if (above < wanted && wanted <= above + total) {
    shared.cut = {static_cast<uint32_t>(last), above, 0, above_before, 0};
  }
  __syncthreads();
  // Of the thread's bins, one lane each, the one with the cut.
  if (threadIdx.x < kWarpSize) {
    static_assert(kHistogramBins <= kThreads * kWarpSize);
    const Cut coarse = shared.cut;
    const int lane = threadIdx.x, bin = static_cast<int>(coarse.bin) - lane;
    uint32_t ties = 0, ties_before = 0;
    if (lane < per_thread && bin >= 0) sum_bin(bin, ties, ties_before);
    uint32_t bins_above = ties, before_above = ties_before;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kFullMask, bins_above, offset);
      const uint32_t other_before = __shfl_up_sync(kFullMask, before_above, offset);
      if (lane >= offset) bins_above += other, before_above += other_before;
    }
    bins_above += coarse.above - ties;
    before_above += coarse.above_before - ties_before;
    __syncwarp();
    if (bins_above < wanted && wanted <= bins_above + ties) {
      shared.cut = {static_cast<uint32_t>(bin), bins_above, ties, before_above, ties_before};
    }
  }
  __syncthreads();
  return shared.cut;
}

// One block's part of a (sequence, KV head).
struct Slice {
  int batch_idx, kv_head_idx;
  int seq_len;
  int begin, end;     // positions
  uint16_t* keys;     // of query token 0, from `begin` on; in shared memory or in the workspace
  int64_t key_pitch;  // from one query token's keys to the next
};

// Where the code and the norm of a position are; null where its page does not exist.
struct CodeAddress {
  const uint32_t* code;
  const uint16_t* norm;
};

__device__ __forceinline__ CodeAddress address_of(const ScoreSelectParams& p, const Slice& slice,
                                                  int position) {
  const CodeCache& cache = p.code_cache;
  const int page = page_of(p.table, slice.batch_idx, position);
  if (page < 0) return {nullptr, nullptr};
  const int64_t row = row_of(p.table, position);
  return {cache.codes + page * cache.code_page_stride + slice.kv_head_idx * cache.code_head_stride +
              row * cache.num_words,
          cache.norms + page * cache.norm_page_stride + slice.kv_head_idx * cache.norm_head_stride +
              row};
}

// Scores the slice for every query token: keys, and counts of those that compete (neither sink nor
// recent) to the histogram.
template <int kNumWords, bool kNorms>
__device__ void scan_slice(const ScoreSelectParams& p, Shared& shared, const Slice& slice,
                           const Bins& bins) {
  // Codes narrower than 16 bytes are loaded several positions at a time where a page has as many.
  constexpr int kPerLoad = kNorms ? 1 : (kNumWords == 1 ? 4 : (kNumWords == 2 ? 2 : 1));
  constexpr int kLoads = kNumWords <= 4 ? 4 : 2;
  constexpr int kCodes = kPerLoad * kLoads;
  constexpr int kStride = kThreads * kPerLoad;  // positions from one load of a thread to the next
  const int num_planes = hata::num_planes(p.weight_sum);
  const CodeCache& cache = p.code_cache;
  const bool whole_loads = (p.table.page_mask + 1u) % kPerLoad == 0 &&
                           reinterpret_cast<uintptr_t>(cache.codes) % 16 == 0 &&
                           cache.code_page_stride % 4 == 0 && cache.code_head_stride % 4 == 0;
  // In a contiguous cache every position lies in the sequence's one page.
  const bool one_page = p.table.max_pages == 1;
  const CodeAddress page_start = address_of(p, slice, 0);

  for (int base = slice.begin + threadIdx.x * kPerLoad; base < slice.end;
       base += kStride * kLoads) {
    Code<kNumWords> codes[kCodes] = {};
    uint16_t norms[kCodes] = {};
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int position = base + load * kStride;
      if (position >= slice.end) continue;
      if (kPerLoad == 1 || whole_loads) {
        CodeAddress from = one_page ? page_start : address_of(p, slice, position);
        if (from.code == nullptr) continue;
        if (one_page) {
          from.code += int64_t{position} * kNumWords;
          from.norm += position;
        }
        const Code<kPerLoad * kNumWords> wide = load_code<kPerLoad * kNumWords>(from.code);
#pragma unroll
        for (int i = 0; i < kPerLoad * kNumWords; ++i) {
          codes[load * kPerLoad + i / kNumWords].words[i % kNumWords] = wide.words[i];
        }
        if constexpr (kNorms) norms[load] = __ldg(from.norm);
      } else {
        for (int i = 0; i < kPerLoad && position + i < slice.end; ++i) {
          const CodeAddress from = address_of(p, slice, position + i);
          if (from.code != nullptr) {
            codes[load * kPerLoad + i] = load_code<kNumWords>(from.code);
          }
        }
      }
    }
    for (int j = 0; j < p.q_len; ++j) {
      int matches[kCodes];
      count_matches(codes, shared.planes + j * num_planes * kNumWords, num_planes, p.weight_sum,
                    matches);
      const int first = p.num_sink;
      const int last = min(visible_len(slice.seq_len, p.q_len, j) - p.num_recent, slice.end);
      const bool all_compete = base >= first && base + (kLoads - 1) * kStride + kPerLoad <= last;
      uint16_t* keys = slice.keys + j * slice.key_pitch + (base - slice.begin);
      uint32_t* histogram = shared.histogram + j * bins.count;
#pragma unroll
      for (int i = 0; i < kCodes; ++i) {
        const int offset = i / kPerLoad * kStride + i % kPerLoad;
        if (!all_compete && (base + offset < first || base + offset >= last)) continue;
        uint32_t key = matches[i];
        if constexpr (kNorms) {
          key = ordered_key_float16(
              float16_score<kNumWords * kWordBits>(matches[i], p.weight_sum, norms[i]));
        }
        keys[offset] = static_cast<uint16_t>(key);
        atomicAdd(histogram + (key >> bins.shift), 1u);
      }
    }
  }
}

// Writes the selected positions of this slice in order: those above the cut, and of the ties all
// but the first ties_to_skip of the cluster.
__device__ void write_slice(Shared& shared, const Slice& slice, const uint16_t* keys, int first,
                            int last, uint32_t cut_key, uint32_t above_before, uint32_t ties_before,
                            uint32_t ties_to_skip, int32_t* indices) {
  for (int begin = slice.begin; begin < slice.end; begin += kBitmapPositions) {
    const int end = min(begin + kBitmapPositions, slice.end);
    const int num_words = ceil_div(end - begin, 32);
    // Bit i of byte b: does key 8 b + i compete and lie above the cut, or equal it?
    for (int byte = threadIdx.x; byte < num_words * 4; byte += kThreads) {
      const int position = begin + byte * 8;
      const uint4 eight = *reinterpret_cast<const uint4*>(keys + (position - slice.begin));
      const uint32_t pairs[] = {eight.x, eight.y, eight.z, eight.w};
      uint32_t above = 0, ties = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t key = i % 2 == 0 ? pairs[i / 2] & 0xffffu : pairs[i / 2] >> 16;
        above |= static_cast<uint32_t>(key > cut_key) << i;
        ties |= static_cast<uint32_t>(key == cut_key) << i;
      }
      const int skip = min(max(first - position, 0), 8);
      const int stop = min(max(min(last, end) - position, 0), 8);
      const uint32_t competing = (0xffu << skip) & ((1u << stop) - 1u);
      reinterpret_cast<uint8_t*>(shared.above_bits)[byte] = above & competing;
      reinterpret_cast<uint8_t*>(shared.tie_bits)[byte] = ties & competing;
    }
    __syncthreads();

    const int words_per_thread = ceil_div(num_words, kThreads);
    const int first_word = threadIdx.x * words_per_thread;
    const int end_word = min(first_word + words_per_thread, num_words);
    uint32_t counts = 0;  // above in the lower half, ties in the upper one
    for (int word = first_word; word < end_word; ++word) {
      counts += __popc(shared.above_bits[word]) + (__popc(shared.tie_bits[word]) << 16);
    }
    uint32_t total;
    const uint32_t before = block_exclusive_scan<kThreads>(counts, total);
    uint32_t num_above = above_before + (before & 0xffffu);
    uint32_t num_ties = ties_before + (before >> 16);
    for (int word = first_word; word < end_word; ++word) {
      const uint32_t ties = shared.tie_bits[word];
      for (uint32_t rest = shared.above_bits[word] | ties; rest != 0; rest &= rest - 1) {
        const int i = __ffs(rest) - 1;
        const bool tied = ties >> i & 1u;
        if (!tied || num_ties >= ties_to_skip) {
          const uint32_t ties_selected = num_ties > ties_to_skip ? num_ties - ties_to_skip : 0;
          indices[num_above + ties_selected] = begin + word * 32 + i;
        }
        num_above += !tied;
        num_ties += tied;
      }
    }
    above_before += total & 0xffffu;
    ties_before += total >> 16;
    __syncthreads();  // the bitmaps may be written again
  }
}

// grid: batch * num_kv_heads clusters. Each block of a cluster scans one slice of the sequence,
// keeping 16-bit keys and a histogram of them; the cluster adds up its histograms, finds the key of
// the last selected position, and each block writes its part of the indices, in order.
template <int kNumWords, bool kNorms>
__global__ void __launch_bounds__(kThreads)
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
  const auto row_of_token = [&](int j) {
    return (int64_t{batch_idx} * p.q_len + j) * p.num_kv_heads + kv_head_idx;
  };
  Slice slice{.batch_idx = batch_idx, .kv_head_idx = kv_head_idx, .seq_len = seq_len};
  slice.begin = min(rank * slice_len, seq_len);
  slice.end = min(slice.begin + slice_len, seq_len);
  if (int64_t{slice_len} * p.q_len <= kSharedKeys) {
    slice.keys = shared.keys;
    slice.key_pitch = slice_len;
  } else {
    const int64_t pitch = key_row_pitch(p.table.capacity);
    slice.keys = p.keys + row_of_token(0) * pitch + slice.begin;
    slice.key_pitch = p.num_kv_heads * pitch;
  }

  const int token_words = num_planes(p.weight_sum) * kNumWords;
  for (int i = threadIdx.x; i < p.q_len * token_words; i += kThreads) {
    shared.planes[i] = p.planes[row_of_token(i / token_words) * token_words + i % token_words];
  }
  __syncthreads();
  // A sequence whose tokens all are selected has nothing to compare.
  if (seq_len > p.top_k) {
    scan_slice<kNumWords, kNorms>(p, shared, slice, bins);
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
    const uint16_t* token_keys = slice.keys + j * slice.key_pitch;
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

template <int kNumWords, bool kNorms>
__global__ void score_select_kernel(const __grid_constant__ ScoreSelectParams, const Bins) {}

#endif

// The largest cluster for which all of them are resident at once.
template <typename Kernel>
int choose_cluster_size(Kernel kernel, int num_clusters, const char* op) {
  for (int size = kMaxCluster; size > 1; size /= 2) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = size;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(num_clusters * size);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = sizeof(Shared);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int resident = 0;
    cuda_check(cudaOccupancyMaxActiveClusters(&resident, kernel, &config), op);
    if (num_clusters <= resident) return size;
  }
  return 1;
}

template <int kNumWords, bool kNorms>
bool launch(const ScoreSelectParams& p, CudaStream stream) {
  constexpr const char* kOp = "hata::score_select";
  const auto kernel = score_select_kernel<kNumWords, kNorms>;
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, kernel), kOp);
  if (attributes.ptxVersion < 90) return false;  // compiled for a GPU without clusters

  allow_shared_memory(kernel, sizeof(Shared), kOp);
  const int pairs = p.table.batch * p.num_kv_heads;
  const int cluster_size = choose_cluster_size(kernel, pairs, kOp);
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
    launched = p.code_cache.norms != nullptr ? launch<num_words, true>(p, stream)
                                             : launch<num_words, false>(p, stream);
  });
  return launched;
}

}  // namespace hata
