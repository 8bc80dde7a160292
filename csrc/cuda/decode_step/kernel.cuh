#pragma once

#include "cuda/decode_step/attend.cuh"
#include "cuda/decode_step/candidates.cuh"
#include "cuda/decode_step/cut.cuh"
#include "cuda/decode_step/encode.cuh"
#include "cuda/decode_step/exchange.cuh"
#include "cuda/decode_step/scan.cuh"
#include "cuda/decode_step/select.cuh"
#include "cuda/primitives/cluster.cuh"
#include "cuda/primitives/launch.cuh"

// The kernel of the fused step: the phases, in the order in which they run.
namespace hata::step {

// Touches every line of a kernel's parameters, which are slow to read the first time, while the
// kernel waits for the one before it.
template <typename KernelParams>
__device__ __forceinline__ void warm_up(const KernelParams& params) {
  constexpr int kLine = 64;  // bytes
  const auto* words = reinterpret_cast<const uint32_t*>(&params);
#pragma unroll
  for (size_t i = 0; i < sizeof(KernelParams) / 4; i += kLine / 4) asm volatile("" ::"r"(words[i]));
}

// Appends this block's share of the new tokens, by its last warps.
__device__ __forceinline__ void append(const Params& params, const SharedPlan& shared) {
  const Slice& slice = shared.slice;
  if (!params.encodes) return;
  if (params.encode.dtype == DType::kBFloat16) {
    write_new_tokens<__nv_bfloat16>(params.append, slice.kv_head_idx, slice.place, slice.begin,
                                    slice.end, shared.new_tokens, shared.new_rows);
  } else {
    write_new_tokens<__half>(params.append, slice.kv_head_idx, slice.place, slice.begin, slice.end,
                             shared.new_tokens, shared.new_rows);
  }
}

// Lets half of the pairs scan when memory has served the scans of the others: so it has work while
// those find their cuts and select, and later while these do.
__device__ __forceinline__ void wait_if_late(const Params& params, const Slice& slice) {
  const PageTable& table = params.select.table;
  const int pair = slice.kv_head_idx * table.batch + slice.batch_idx;
  if (params.late_cycles == 0.0f || pair * 2 < table.batch * params.select.num_kv_heads) return;
  const int64_t begin = clock64();
  int kilotokens = 0;  // of all sequences
  for (int b = threadIdx.x % kWarpSize; b < table.batch; b += kWarpSize) {
    kilotokens += seq_len_of(table, b) / 1024;
  }
  kilotokens = __reduce_add_sync(kFullMask, kilotokens);
  // What is longer than most is what the whole step waits for.
  const int most = kilotokens + kilotokens / 4;
  const auto cycles = static_cast<int>(params.late_cycles * static_cast<float>(kilotokens));
  if (cycles < kLeastLateCycles || slice.seq_len / 1024 * table.batch > most) return;
  constexpr int kPause = 100;  // nanoseconds
  while (clock64() - begin < cycles) __nanosleep(kPause);
}

// One block's part of the step, from its beginning to its end.
template <int kNumWords, bool kNorms, KernelKind kKind>
__device__ __forceinline__ void run_step(const Params& params) {
  extern __shared__ __align__(16) char shared_bytes[];
  SharedPlan& shared = *reinterpret_cast<SharedPlan*>(shared_bytes);
  char* const behind_plan = shared_bytes + kPlanBytes;
  const ScoreSelectParams& p = params.select;
  using AllRanks = AllRanks<kNumWords, kNorms, kKind>;
  using Candidates = Candidates<kNumWords, kNorms, kKind>;
  constexpr bool kTokens = kKind == KernelKind::kTokens, kTeams = kKind == KernelKind::kTeams;
  constexpr bool kGrid = kKind == KernelKind::kGrid || kTeams;
  constexpr int kChunk = AllRanks::Chunk::kPositions;
  const int warp = threadIdx.x / kWarpSize;
  const int blocks_per_pair = kGrid ? params.blocks_per_pair : blocks_of_cluster();
  const bool is_grid = kGrid && (!kTeams || blocks_per_pair > blocks_of_cluster());

  // Begin: barriers, and zeros.
  ScanTables& tables = shared.scan.tables;
  if constexpr (kGrid) {
    auto* const inbox = reinterpret_cast<uint32_t*>(&shared.pair_inbox);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(PairInbox) / 4); i += blockDim.x) {
      inbox[i] = 0;
    }
  }
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
  if (threadIdx.x < kMaxTokens) tables.largest[threadIdx.x] = tables.bases[threadIdx.x] = 0;
  if (threadIdx.x < kMaxPlanes * kMaxWords) tables.no_planes[threadIdx.x] = 0;
  tables.weights.set(p.weight_sum, threadIdx.x);
  if (warp < p.q_len) {
    const int planes = num_planes(p.weight_sum);
    if (threadIdx.x == 0) tables.num_planes = planes;
    add_ones(tables.planes + warp * padded_planes(planes) * kNumWords, planes, kNumWords,
             threadIdx.x % kWarpSize, kWarpSize);
  }

  // Encode, and say which slice is this block's.
  {
    Place place{kGrid ? static_cast<int>(blockIdx.x) % blocks_per_pair : block_of_cluster(),
                blocks_per_pair};
    const int batch_idx = kGrid ? static_cast<int>(blockIdx.x) / blocks_per_pair : cluster_idx();
    const int kv_head_idx = blockIdx.y;
    const EncodeTask task{params.encode, params.append, batch_idx,
                          kv_head_idx,   params.group,  place};
    const EncodeScratch scratch(behind_plan, params.rank_bytes, params.encode, params.group);
    warm_up(params);
    // Hash weights are older than the previous kernel (decode_step.h): they need not wait for it.
    if (params.encodes) load_pass(task, scratch, 0);
    wait_for_previous_kernel();
    let_next_kernel_launch();
    if (params.encodes) {
      load_vectors(task, scratch, shared.new_rows,
                   params.attends && !kTeams ? shared.attend.queries : nullptr);
    }
    const int seq_len = seq_len_of(p.table, batch_idx);
    if constexpr (kGrid) {
      place.num_blocks = blocks_that_share(params, seq_len);
      // A block that the sequence has no use for leaves, and lets the others of its cluster and of
      // the grid pass their barriers.
      if (place.block >= place.num_blocks) {
        wait_at_cluster_barrier();
        cp_async_wait<0>();
        if (is_grid) arrive_at_grid_barrier();
        return;
      }
    }
    const int page = only_page(p.table, batch_idx);
    const CodeReader<kNumWords> reader(p.table, p.code_cache, batch_idx, kv_head_idx, page);
    const int slice_len =
        ceil_div(ceil_div(seq_len, place.num_blocks), kSliceAlignment) * kSliceAlignment;
    Slice slice{.place = place,
                .first_list = int64_t{batch_idx} * p.q_len * p.num_kv_heads + kv_head_idx,
                .batch_idx = batch_idx,
                .kv_head_idx = kv_head_idx,
                .seq_len = seq_len,
                .only_page = page,
                .begin = min(place.block * slice_len, seq_len)};
    slice.end = min(slice.begin + slice_len, seq_len);
    slice.length = slice_len;
    slice.last = min(visible_len(seq_len, p.q_len, 0) - p.num_recent, slice.end);
    if (threadIdx.x == 0) shared.slice = slice;
    // Memory works on the first codes while the planes are made.
    reader.template prefetch<kNorms, kChunk>(slice.begin + warp * kChunk, slice.end);
    prepare_planes<kNumWords, kTokens>(params, shared, task, scratch);
  }

  // Scan, and find the cuts.
  const Slice& slice = shared.slice;  // in shared memory, which leaves the scan its registers
  const bool chooses = must_choose(p, slice.seq_len);
  const AllRanks all_ranks{reinterpret_cast<uint16_t*>(behind_plan), slice.length};
  const bool keeps_all = kKind == KernelKind::kRanksFit || kGrid || !chooses ||
                         (p.algorithm != ScoreSelectAlgorithm::kCandidates &&
                          int64_t{slice.length} * p.q_len * 2 <= params.rank_bytes);
  const auto scratch = reinterpret_cast<uint32_t*>(behind_plan);
  const CandidateSource<Candidates> candidates{
      {params, shared, scratch},
      {scratch + kTableWords, scratch + kTableWords + params.num_bit_words,
       TileBits::words_for(slice.length, static_cast<int>(blockDim.x))}};
  int repeats = 0;
  const bool shares = kGrid && shares_grid(slice.place);
  if (keeps_all) {
    if (chooses) {
      if constexpr (kKind == KernelKind::kRanksFit) wait_if_late(params, slice);
      scan<kNumWords, kNorms, kTokens>(params, shared, slice, all_ranks,
                                       chunks_of_slice(slice, kChunk));
    }
    __syncthreads();
    wait_at_cluster_barrier();  // every block has begun
    if (shares) {
      GridArrival arrival = tell_grid(params, shared, chooses);
      append(params, shared);
      wait_at_grid_barrier(arrival);
      if (chooses) find_cut_of_pair(params, shared);
    } else {
      if (is_grid) arrive_at_grid_barrier();  // the blocks of other pairs wait there
      if (chooses) find_cuts(params, shared, 0);
    }
  } else {
    repeats = scan_for_candidates<kNumWords, kNorms, kKind>(params, shared, candidates);
  }
  // The last warps append while others find the cuts.
  if (!shares) append(params, shared);
  __syncthreads();

  // Select.
  const int kept_offset = SharedPlan::kept_offset(slice.end - slice.begin, params.row_end);
  const auto kept = reinterpret_cast<int32_t*>(shared_bytes + kept_offset);
  const int num_kept = !kTokens && params.attends && keeps_all
                           ? max(kPlanBytes + params.rank_bytes - kept_offset, 0) / 4
                           : 0;
  IndexRange range;
  if (keeps_all) {
    const RankSource<AllRanks, kNorms> ranks{all_ranks, ComparedRanks::pieces_for(slice.length)};
    const auto find_fine_cuts = [&] {
      shares ? find_fine_cut_of_pair(params, shared) : find_cuts(params, shared, 1);
    };
    range = select_from(params, shared, ranks, find_fine_cuts, kept, num_kept);
  } else {
    range = select_from(
        params, shared, candidates, [&] { find_cuts(params, shared, 1, repeats); }, kept, num_kept);
  }

  // Attend.
  if (kTokens || !params.attends) return;
  const bool evens_out = shares && is_uneven(params, shared);
  if (evens_out) range = even_share(params, slice);
  if (threadIdx.x == 0) {
    const int num_positions = range.end - range.first;
    shared.attend.list = {.batch_idx = slice.batch_idx,
                          .kv_head_idx = slice.kv_head_idx,
                          .visible = slice.seq_len,
                          .only_page = slice.only_page,
                          .num_positions = num_positions,
                          .positions = num_positions <= num_kept && !evens_out
                                           ? kept
                                           : p.indices + slice.first_list * p.top_k + range.first};
  }
  __syncthreads();  // the positions are written
  const auto merge = [&](const Partials& partials, void* inbox, int64_t first_query, int group) {
    if (shares) {
      merge_pair(params, shared, partials, first_query, group);
    } else {
      merge_cluster(params.attend, shared, inbox, partials, first_query, group);
    }
  };
  if constexpr (kTeams) {
    attend_selected_in_teams(params, shared, merge);
  } else {
    attend_selected(params.attend, shared, merge);
  }
}

// grid: (batch clusters, num_kv_heads), or with kGrid (batch blocks_per_pair, num_kv_heads). Each
// block of a pair scans one slice of the sequence, keeping ranks and a histogram of them; the
// blocks add up their histograms and find the rank of the last selected position; each block writes
// its part of the indices, in order, and attends over it.
template <int kNumWords, bool kNorms, KernelKind kKind>
__global__ void __launch_bounds__(many_threads(kKind), 1)
    decode_step_kernel(const __grid_constant__ Params params) {
  if constexpr (kIsSm90) run_step<kNumWords, kNorms, kKind>(params);
}

}  // namespace hata::step
