#include "cuda/score_select_cluster.h"

#include <cooperative_groups.h>

#include "cuda/cluster_barrier.cuh"
#include "cuda/cluster_encode.cuh"
#include "cuda/cluster_guess.cuh"
#include "cuda/cluster_scan.cuh"
#include "cuda/cluster_select.cuh"
#include "cuda/cluster_shape.cuh"
#include "cuda/launch.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kMaxGridY = 65535;  // KV heads
// Of one block alone, so that every position has a place in a CandidateList.
constexpr int kMostCapacity = few_threads(ClusterUse::kTokens) * kMostPlaces;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace cg = cooperative_groups;

__device__ __forceinline__ int cluster_idx() {
  int x;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(x));
  return x;
}

// The planes of all query tokens, in shared memory as the scan reads them.
template <int kNumWords, bool kTokens>
__device__ __forceinline__ void prepare_planes(const ClusterParams& params, ClusterShared& shared,
                                               const EncodeTask& task,
                                               const EncodeScratch& scratch) {
  const ScoreSelectParams& p = params.select;
  ScanTables& scan = shared.scan;
  const int num_planes = hata::num_planes(p.weight_sum);
  const int token_words = num_planes * kNumWords;
  const int pitch = padded_planes(num_planes) * kNumWords;
  if (!params.encodes) {
    for (int i = threadIdx.x; i < p.q_len * token_words; i += blockDim.x) {
      const int j = i / token_words, word = i % token_words;
      const int64_t row =
          (int64_t{task.batch_idx} * p.q_len + j) * p.num_kv_heads + task.kv_head_idx;
      scan.planes[j * pitch + word] = p.planes[row * token_words + word];
    }
  } else if (params.encode.dtype == DType::kBFloat16) {
    encode<__nv_bfloat16>(task, scratch, scan.largest, scan.bases, scan.planes, pitch,
                          shared.new_tokens);
  } else {
    encode<__half>(task, scratch, scan.largest, scan.bases, scan.planes, pitch, shared.new_tokens);
  }
  __syncthreads();
  const bool at_once = kTokens && scores_at_once<kNumWords>(p.q_len, p.weight_sum);
  if (at_once) set_token_weights<kNumWords>(params, shared);
  const int warp = threadIdx.x / kWarpSize;
  static_assert(kMaxClusterTokens <= few_threads(ClusterUse::kTokens) / kWarpSize);
  if (!params.encodes && warp < p.q_len) {
    scan.bases[warp] = plane_base<kNumWords>(scan.planes + warp * pitch, p.weight_sum);
  }
  if (at_once || !params.encodes) __syncthreads();
}

// Touches every line of a kernel's parameters, which are slow to read the first time, while the
// kernel waits for the one before it.
template <typename Params>
__device__ __forceinline__ void warm_up(const Params& params) {
  constexpr int kLine = 64;  // bytes
  const auto* words = reinterpret_cast<const uint32_t*>(&params);
#pragma unroll
  for (size_t i = 0; i < sizeof(Params) / 4; i += kLine / 4) asm volatile("" ::"r"(words[i]));
}

// Attends over what this block selected.
__device__ __forceinline__ void attend_selected(const GatherAttentionParams& p,
                                                ClusterShared& shared) {
  const auto call = [&]<typename T, int kHeadDim>() {
    attend<T, kHeadDim>(p, shared.slice.place, shared.attend, shared.histogram, shared.results);
  };
  const auto call_for_type = [&]<typename T>() {
    if (p.cache.head_dim == 128) return call.template operator()<T, 128>();
    if (p.cache.head_dim == 96) return call.template operator()<T, 96>();
    return call.template operator()<T, 64>();
  };
  p.cache.dtype == DType::kBFloat16 ? call_for_type.template operator()<__nv_bfloat16>()
                                    : call_for_type.template operator()<__half>();
}

// grid: (batch clusters, num_kv_heads). Each block of a cluster scans one slice of the sequence,
// keeping 16-bit keys and a histogram of them; the cluster adds up its histograms and finds the key
// of the last selected position; each block writes its part of the indices, in order, and attends
// over it. kAllFit: so do the keys of a full cache.
template <int kNumWords, bool kNorms, ClusterUse kUse>
__global__ void __launch_bounds__(many_threads(kUse), 1)
    score_select_kernel(const __grid_constant__ ClusterParams params) {
  extern __shared__ __align__(16) char shared_bytes[];
  ClusterShared& shared = *reinterpret_cast<ClusterShared*>(shared_bytes);
  const ScoreSelectParams& p = params.select;
  constexpr bool kAllFit = kUse == ClusterUse::kAllFit;
  constexpr bool kTokens = kUse == ClusterUse::kTokens;
  constexpr int kChunk = AllKeys<kNumWords, kNorms, kUse>::Chunk::kPositions;
  const int warp = threadIdx.x / kWarpSize;
  const int num_blocks = cg::this_cluster().num_blocks();
  if (threadIdx.x == 0) {
    shared.guesses_arrived.init();
    shared.sums_arrived.init();
    for (int j = 0; j < max(p.q_len, 2); ++j) shared.bins_arrived[j].init();
    shared.attend.results_arrived.init();
  }
  arrive_at_cluster_barrier();
#pragma unroll 1
  for (int i = threadIdx.x; i < p.q_len * params.bins.counts[0]; i += blockDim.x) {
    shared.histogram[i] = 0;
  }
  if (threadIdx.x < kMaxClusterTokens) {
    shared.scan.largest[threadIdx.x] = shared.scan.bases[threadIdx.x] = 0;
  }
  if (threadIdx.x < kMaxPlanes * kMaxWords) shared.scan.no_planes[threadIdx.x] = 0;
  shared.scan.weights.set(p.weight_sum, threadIdx.x);
  if (warp < p.q_len) {
    const int planes = num_planes(p.weight_sum);
    if (threadIdx.x == 0) shared.scan.num_planes = planes;
    add_ones(shared.scan.planes + warp * padded_planes(planes) * kNumWords, planes, kNumWords,
             threadIdx.x % kWarpSize, kWarpSize);
  }
  {
    const ClusterPlace place{static_cast<int>(cg::this_cluster().block_rank()), num_blocks};
    const int batch_idx = cluster_idx();
    const int kv_head_idx = blockIdx.y;
    const EncodeTask task{params.encode, params.append, batch_idx,
                          kv_head_idx,   params.group,  place};
    const EncodeScratch scratch(shared_bytes + kKeyOffset, params.key_bytes, params.encode,
                                params.group);
    warm_up(params);
    // Hash weights are older than the previous kernel (decode_step.h): they need not wait for it.
    if (params.encodes) load_pass(task, scratch, 0);
    wait_for_previous_kernel();
    let_next_kernel_launch();
    if (params.encodes) {
      load_rows(task, scratch, shared.new_rows, params.attends ? shared.attend.queries : nullptr);
    }
    const int seq_len = seq_len_of(p.table, batch_idx);
    const int page = only_page(p.table, batch_idx);
    const CodeReader<kNumWords> reader(p.table, p.code_cache, batch_idx, kv_head_idx, page);
    const int slice_len =
        ceil_div(ceil_div(seq_len, num_blocks), kSliceAlignment) * kSliceAlignment;
    ClusterSlice slice{.place = place,
                       .first_row = int64_t{batch_idx} * p.q_len * p.num_kv_heads + kv_head_idx,
                       .batch_idx = batch_idx,
                       .kv_head_idx = kv_head_idx,
                       .seq_len = seq_len,
                       .only_page = page,
                       .begin = min(place.rank * slice_len, seq_len)};
    slice.end = min(slice.begin + slice_len, seq_len);
    slice.length = slice_len;
    slice.last = min(visible_len(seq_len, p.q_len, 0) - p.num_recent, slice.end);
    if (threadIdx.x == 0) shared.slice = slice;
    // Memory works on the first codes while the planes are made.
    reader.template prefetch<kNorms, kChunk>(slice.begin + warp * kChunk, slice.end);
    prepare_planes<kNumWords, kTokens>(params, shared, task, scratch);
  }
  // In shared memory, which leaves the scan its registers.
  const ClusterSlice& slice = shared.slice;
  const bool chooses = must_choose(p, slice.seq_len);
  const AllKeys<kNumWords, kNorms, kUse> keys{
      reinterpret_cast<uint16_t*>(shared_bytes + kKeyOffset), slice.length};
  const bool keeps_all = kAllFit || !chooses ||
                         (p.algorithm != ScoreSelectAlgorithm::kCandidates &&
                          int64_t{slice.length} * p.q_len * 2 <= params.key_bytes);
  const auto scratch = reinterpret_cast<uint32_t*>(shared_bytes + kKeyOffset);
  const CandidateSource<Candidates<kNumWords, kNorms, kUse>> source{
      {params, shared, scratch},
      {scratch + kTableWords, scratch + kTableWords + params.num_bit_words,
       TileBits::words_for(slice.length, static_cast<int>(blockDim.x))}};
  int repeats = 0;
  if (keeps_all) {
    if (chooses)
      scan<kNumWords, kNorms, kTokens>(params, shared, slice, keys, chunks_of_slice(slice, kChunk));
    __syncthreads();
    wait_at_cluster_barrier();  // every block has begun
    if (chooses) find_cuts(params, shared, 0);
  } else {
    repeats = scan_for_candidates<kNumWords, kNorms, kUse>(params, shared, source);
  }
  // The last warps append while others find the cuts.
  if (params.encodes) {
    if (params.encode.dtype == DType::kBFloat16) {
      write_new_tokens<__nv_bfloat16>(params.append, slice.kv_head_idx, slice.place, slice.begin,
                                      slice.end, shared.new_tokens, shared.new_rows);
    } else {
      write_new_tokens<__half>(params.append, slice.kv_head_idx, slice.place, slice.begin,
                               slice.end, shared.new_tokens, shared.new_rows);
    }
  }
  __syncthreads();
  // Positions are kept where neither keys nor rows lie.
  const int kept_offset = max(kKeyOffset + (slice.end - slice.begin + 7) / 8 * 16, params.row_end);
  const auto kept = reinterpret_cast<int32_t*>(shared_bytes + kept_offset);
  const int num_kept = !kTokens && params.attends && keeps_all
                           ? max(kKeyOffset + params.key_bytes - kept_offset, 0) / 4
                           : 0;
  IndexRange range;
  if (keeps_all) {
    const KeySource<AllKeys<kNumWords, kNorms, kUse>, kNorms> source{
        keys, ComparedKeys::pieces_for(slice.length)};
    range = select_from(params, shared, source, 0, kept, num_kept);
  } else {
    range = select_from(params, shared, source, repeats, kept, num_kept);
  }
  if (kTokens || !params.attends) return;
  if (threadIdx.x == 0) {
    const int num_positions = range.end - range.first;
    shared.attend.list = {.batch_idx = slice.batch_idx,
                          .kv_head_idx = slice.kv_head_idx,
                          .visible = slice.seq_len,
                          .only_page = slice.only_page,
                          .num_positions = num_positions,
                          .positions = num_positions <= num_kept
                                           ? kept
                                           : p.indices + slice.first_row * p.top_k + range.first};
  }
  __syncthreads();  // the positions are written
  attend_selected(params.attend, shared);
}

#else

template <int kNumWords, bool kNorms, ClusterUse kUse>
__global__ void score_select_kernel(const __grid_constant__ ClusterParams) {}

#endif

template <int kNumWords, bool kNorms>
bool launch(ClusterParams& params, CudaStream stream) {
  constexpr const char* kOp = "hata::score_select";
  const auto all_fit = score_select_kernel<kNumWords, kNorms, ClusterUse::kAllFit>;
  const auto one_token = score_select_kernel<kNumWords, kNorms, ClusterUse::kOneToken>;
  const bool one = params.select.q_len == 1;
  const auto kernel = one ? all_fit : score_select_kernel<kNumWords, kNorms, ClusterUse::kTokens>;
  if (!compiled_for_clusters(kernel, kOp)) return false;
  allow_shared_memory(kernel, kKeyOffset + kMostKeyBytes, kOp);
  const ClusterShape shape =
      choose_shape(kernel, one ? ClusterUse::kAllFit : ClusterUse::kTokens, params, kOp);
  params.bins = bins_for(params.select, num_keys(params.select));
  params.key_bytes = shape.key_bytes;
  share_out_candidates(params, shape);
  params.row_end = kRowOffset + attend_row_bytes(shape.threads, params.attend.cache.head_dim);
  launch_kernel(
      kernel == all_fit && !all_keys_fit(params.select, shape) ? one_token : kernel,
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
  if (p.q_len > kMaxClusterTokens || p.table.capacity > kMostCapacity) return false;
  if (p.num_kv_heads > kMaxGridY) return false;
  if (p.table.batch == 0 || p.num_kv_heads == 0 || p.q_len == 0) return true;
  bool launched = false;
  dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>("num_words", p.code_cache.num_words, [&](auto num_words) {
    launched = p.code_cache.norms != nullptr ? launch<num_words, true>(params, stream)
                                             : launch<num_words, false>(params, stream);
  });
  return launched;
}

bool run_step(const DecodeStepParams& p, bool attends, CudaStream stream) {
  if (p.select.num_recent < p.select.q_len) return false;
  ClusterParams params{.select = p.select,
                       .encodes = true,
                       .encode = p.encode,
                       .append = p.append,
                       .group = p.encode.num_heads / p.encode.num_kv_heads,
                       .attends = attends,
                       .attend = p.attend};
  return run(params, stream);
}

}  // namespace

bool score_select_cluster(const ScoreSelectParams& p, CudaStream stream) {
  ClusterParams params{};
  params.select = p;
  return run(params, stream);
}

bool encode_score_select_cluster(const DecodeStepParams& p, CudaStream stream) {
  return run_step(p, false, stream);
}

bool decode_step_cluster(const DecodeStepParams& p, CudaStream stream) {
  return cluster_can_attend(p.attend) && run_step(p, true, stream);
}

}  // namespace hata
