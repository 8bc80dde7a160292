#pragma once

#include <algorithm>
#include <bit>
#include <optional>

#include "cuda/decode_step/kernel.cuh"
#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/memo.h"

// How the fused step is cut into blocks, and its launch.
namespace hata::step {

// How the work is cut: threads of a block, their shared memory behind the plan, and the blocks that
// share a pair: a cluster, or with kGrid any number.
struct LaunchPlan {
  int threads;
  int rank_bytes;
  int blocks_per_pair;
  bool is_resident = false;  // all clusters at once
};

// Returns the positions of a block's slice of a full cache.
inline int slice_of(const ScoreSelectParams& p, int blocks_per_pair) {
  return ceil_div(p.table.capacity, blocks_per_pair * kSliceAlignment) * kSliceAlignment;
}

// Returns how warps attend in teams: with as many tiles in flight as there is room for.
inline TeamPlan choose_team_plan(const GatherAttentionParams& p, int threads) {
  const bool shares = threads == few_threads(KernelKind::kTeams);
  const int room = kPlanBytes + (shares ? kSharingRankBytes : kMostRankBytes) - kRowOffset;
  const auto plan = [&](int stages) {
    return team_plan(threads, group_of(p), p.cache.head_dim, p.cache.dtype, stages);
  };
  return plan(kTeamStages).bytes <= room ? plan(kTeamStages) : plan(1);
}

// Returns the shared memory from the histogram on that the attention takes.
inline int attend_bytes(const GatherAttentionParams& p, int threads) {
  return needs_teams(p) ? choose_team_plan(p, threads).bytes
                        : attend_row_bytes(threads, p.cache.head_dim, p.cache.dtype);
}

// Returns the shared memory for the ranks of one block's slice of a full cache, within what there
// is; in all enough for rows, which take the place of everything from the histogram on.
inline int rank_bytes_for(const Params& params, int threads, bool shares, int blocks_per_pair) {
  const ScoreSelectParams& p = params.select;
  if (shares) return kSharingRankBytes;
  if (p.algorithm == ScoreSelectAlgorithm::kCandidates) return kMostRankBytes;
  int64_t bytes = int64_t{slice_of(p, blocks_per_pair)} * p.q_len * 2;
  if (params.attends) {
    const int row_end = kRowOffset + attend_bytes(params.attend, threads);
    bytes = std::max<int64_t>(bytes, row_end - kPlanBytes) + kKeptBytes;
  }
  return static_cast<int>(std::clamp<int64_t>(bytes, kSharingRankBytes, kMostRankBytes));
}

// Whether the ranks of a full cache fit into shared memory. Otherwise, lists of candidates do.
inline bool all_ranks_fit(const ScoreSelectParams& p, const LaunchPlan& plan) {
  return p.algorithm != ScoreSelectAlgorithm::kCandidates &&
         int64_t{slice_of(p, plan.blocks_per_pair)} * p.q_len * 2 <= plan.rank_bytes;
}

constexpr int list_entries(int bytes, int bit_words, int threads, int q_len) {
  return (bytes - (kTableWords + 2 * bit_words) * 4) / (threads * q_len * 4);
}
constexpr bool lists_fit(int bytes, int threads, int q_len) {
  return list_entries(bytes, threads * ComparedRanks::kWords, threads, q_len) >=
         kListHeader + kListGroup;
}
constexpr bool lists_fit(KernelKind kind, int q_len) {
  return lists_fit(kSharingRankBytes, few_threads(kind), q_len) &&
         lists_fit(kMostRankBytes, many_threads(kind), q_len);
}
static_assert(lists_fit(KernelKind::kOneToken, 1));
static_assert(lists_fit(KernelKind::kTokens, kMaxTokens));

// Says how long the lists of candidates are, and how many words each half of TileBits has.
inline void share_out_candidates(Params& params, const LaunchPlan& plan) {
  const ScoreSelectParams& p = params.select;
  params.num_bit_words =
      plan.threads * TileBits::words_for(slice_of(p, plan.blocks_per_pair), plan.threads);
  const int entries = list_entries(plan.rank_bytes, params.num_bit_words, plan.threads, p.q_len);
  const bool few = p.algorithm == ScoreSelectAlgorithm::kCandidates;
  const int used = few ? kListHeader + kListGroup : entries;
  params.list_bytes = used * plan.threads * 4;
  params.list_full = (used - kListGroup) * plan.threads * 4;
}

inline Bins bins_for(const ScoreSelectParams& p) {
  const int ranks = p.code_cache.norms != nullptr ? 1 << 16 : p.max_matches() + 1;
  const auto padded = [](int bins) { return ceil_div(bins, kGroupBins) * kGroupBins; };
  // If there must be a second histogram, one of a single group is found fastest.
  int shift = padded(ranks) * p.q_len <= kHistogramBins ? 0 : std::bit_width(kGroupBins - 1u);
  while (padded(ceil_div(ranks, 1 << shift)) * p.q_len > kHistogramBins) ++shift;
  return {{padded(ceil_div(ranks, 1 << shift)), padded(1 << shift)}, shift};
}

// How many clusters of a kernel a device holds at once. Blocks of many threads have a
// multiprocessor to themselves, because their registers fill it, so that it does not matter how
// much shared memory they take.
struct ResidentClusters {
  bool exist;             // the device has clusters
  int few[kMaxCluster];   // of 1, 2, ... blocks of few_threads()
  int many[kMaxCluster];  // of many_threads()
};

// Asks the current device, once: that is slow.
template <int kNumWords, bool kNorms, KernelKind kKind>
ResidentClusters resident_clusters(const char* op) {
  static Memo<int, ResidentClusters> remembered;
  return remembered.get(current_device(op), [&] {
    const auto kernel = decode_step_kernel<kNumWords, kNorms, kKind>;
    ResidentClusters resident{.exist = compiled_for_clusters(kernel, op)};
    if (!resident.exist) return resident;
    allow_shared_memory(kernel, kPlanBytes + kMostRankBytes, op);
    for (int size = 1; size <= kMaxCluster; ++size) {
      const auto ask = [&](int threads, int rank_bytes) {
        return max_active_clusters(kernel, threads, kPlanBytes + rank_bytes, size, op);
      };
      resident.few[size - 1] = ask(few_threads(kKind), kSharingRankBytes);
      resident.many[size - 1] = ask(many_threads(kKind), kMostRankBytes);
    }
    return resident;
  });
}

// How long half of the pairs wait before they scan (wait_if_late()): the time in which memory could
// bring the codes of the others, or a little less. Of 0.7, 0.85 and 1 the best for B on an H100
// (docs/kernels/log.md).
constexpr float kLateShare = 0.85f;

// Returns the bytes that memory brings at most in a cycle of the current device's multiprocessors.
inline float bytes_per_cycle(const char* op) {
  static Memo<int, float> remembered;
  return remembered.get(current_device(op), [&] {
    constexpr float kBitsPerByte = 8, kEdges = 2;  // of a clock of the memory
    const auto ask = [&](cudaDeviceAttr attribute) {
      return static_cast<float>(device_attribute(attribute, op));
    };
    return ask(cudaDevAttrMemoryClockRate) * kEdges * ask(cudaDevAttrGlobalMemoryBusWidth) /
           kBitsPerByte / ask(cudaDevAttrClockRate);
  });
}

// What a multiprocessor scans at most in a cycle, in bytes of codes of two words or more. B and A
// gain from late pairs where half of the multiprocessors ask for 1.25 times what memory brings, on
// an H100, and lose where they ask for 0.85 of it, on an H200 (docs/kernels/log.md).
constexpr float kScannedBytes = 32;

// Returns Params::late_cycles of clusters that are all resident: 0 where nothing follows the scan
// that memory could work for, and where half of the multiprocessors cannot keep memory busy, since
// their instructions bind them: with codes of one word, and where memory is fast.
inline float late_cycles_for(const Params& params, const char* op) {
  const ScoreSelectParams& p = params.select;
  if (!params.attends || p.code_cache.num_words == 1) return 0.0f;
  const auto multiprocessors =
      static_cast<float>(device_attribute(cudaDevAttrMultiProcessorCount, op));
  if (kScannedBytes * multiprocessors / 2 < bytes_per_cycle(op)) return 0.0f;
  const int token_bytes = p.code_cache.num_words * 4 + (p.code_cache.norms != nullptr ? 2 : 0);
  const auto kilotoken_bytes = static_cast<float>(1024 * token_bytes * p.num_kv_heads);
  return kLateShare * kilotoken_bytes / 2 / bytes_per_cycle(op);
}

// Chooses the plan with the most threads for which all clusters are resident at once: a second wave
// would wait for the slowest of the first.
inline LaunchPlan choose_plan(const ResidentClusters& resident, KernelKind kind,
                              const Params& params) {
  const int num_clusters = params.select.table.batch * params.select.num_kv_heads;
  LaunchPlan best{few_threads(kind), kSharingRankBytes, 1};
  int most = 0;
  for (const bool shares : {false, true}) {
    const int threads = shares ? few_threads(kind) : many_threads(kind);
    const int* clusters = shares ? resident.few : resident.many;
    for (int size = 1; size <= kMaxCluster; ++size) {
      if (num_clusters <= clusters[size - 1] && threads * size > most) {
        most = threads * size;
        best = {threads, rank_bytes_for(params, threads, shares, size), size, true};
      }
    }
  }
  return best;
}

// The first cluster of a pair may have slices of twice kGridCost (shortest_for_grid()).
static_assert(2 * kGridCost * 2 <= kSharingRankBytes);

// A grid whose blocks share the pairs: clusters, the first of which serves a pair alone where its
// sequence is short.
struct GridPlan {
  LaunchPlan plan;
  int cluster_size;
  int grid_from;  // as in Params
};

// Chooses the plan by which the blocks of the whole grid share the pairs; nothing where clusters
// serve them better, or must.
inline std::optional<GridPlan> choose_grid_plan(const ResidentClusters& resident, KernelKind kind,
                                                const Params& params) {
  const ScoreSelectParams& p = params.select;
  const bool is_forced = p.algorithm == ScoreSelectAlgorithm::kGrid;
  if (!is_forced && p.algorithm != ScoreSelectAlgorithm::kAuto) return std::nullopt;
  const int64_t num_pairs = int64_t{p.table.batch} * p.num_kv_heads;
  const int threads = many_threads(kind);
  const int most = std::min(kMaxGridBlocks, threads / kWarpSize * kBlocksOfWarp);  // of a pair
  // On an H100 there is no room for two clusters of eight for each of eight pairs.
  for (const int size : {kMaxCluster, kMaxCluster / 2}) {
    const int clusters = std::min(resident.many[size - 1], kMaxGridBlocks / size);
    const int blocks = std::min(static_cast<int>(clusters / num_pairs) * size, most / size * size);
    if (blocks <= kMaxCluster) continue;
    const LaunchPlan plan{threads, rank_bytes_for(params, threads, false, blocks), blocks};
    const int shortest = shortest_for_grid(blocks, kMaxCluster);
    if (!all_ranks_fit(p, plan) || (!is_forced && p.table.capacity < shortest)) continue;
    return GridPlan{plan, size, is_forced ? 0 : shortest_for_grid(blocks, size)};
  }
  return std::nullopt;
}

// With fewer (sequence, KV head) pairs clusters of teams take longer than gather_attention in a
// launch of its own, whose blocks are more: by the times of one pair and of four
// (docs/kernels/score_select.md).
constexpr int kMinTeamPairs = 4;

template <int kNumWords, bool kNorms>
bool launch(Params& params, CudaStream stream) {
  constexpr const char* kOp = "hata::score_select";
  const ScoreSelectParams& p = params.select;
  const bool one = p.q_len == 1, in_teams = params.attends && needs_teams(params.attend);
  const KernelKind kind = in_teams ? KernelKind::kTeams
                          : one    ? KernelKind::kRanksFit
                                   : KernelKind::kTokens;
  const ResidentClusters resident =
      in_teams ? resident_clusters<kNumWords, kNorms, KernelKind::kTeams>(kOp)
      : one    ? resident_clusters<kNumWords, kNorms, KernelKind::kRanksFit>(kOp)
               : resident_clusters<kNumWords, kNorms, KernelKind::kTokens>(kOp);
  if (!resident.exist) return false;
  std::optional<GridPlan> grid;
  if (in_teams) {
    grid = choose_grid_plan(resident, kind, params);
  } else if (one) {
    grid = choose_grid_plan(resident_clusters<kNumWords, kNorms, KernelKind::kGrid>(kOp),
                            KernelKind::kGrid, params);
  }
  const LaunchPlan plan = grid ? grid->plan : choose_plan(resident, kind, params);
  const bool few_pairs = int64_t{p.table.batch} * p.num_kv_heads < kMinTeamPairs;
  if (in_teams && ((few_pairs && !grid) || !all_ranks_fit(p, plan))) return false;
  params.bins = bins_for(p);
  params.blocks_per_pair = plan.blocks_per_pair;
  params.grid_from = grid ? grid->grid_from : 0;
  params.rank_bytes = plan.rank_bytes;
  const bool is_one_wave = !grid && plan.is_resident;
  params.late_cycles = is_one_wave ? late_cycles_for(params, kOp) : 0.0f;
  share_out_candidates(params, plan);
  if (params.attends) params.row_end = kRowOffset + attend_bytes(params.attend, plan.threads);
  if (in_teams) params.teams = choose_team_plan(params.attend, plan.threads);
  const auto kernel = in_teams ? decode_step_kernel<kNumWords, kNorms, KernelKind::kTeams>
                      : grid   ? decode_step_kernel<kNumWords, kNorms, KernelKind::kGrid>
                      : !one   ? decode_step_kernel<kNumWords, kNorms, KernelKind::kTokens>
                      : all_ranks_fit(p, plan)
                          ? decode_step_kernel<kNumWords, kNorms, KernelKind::kRanksFit>
                          : decode_step_kernel<kNumWords, kNorms, KernelKind::kOneToken>;
  launch_kernel(kernel,
                {.grid = dim3(p.table.batch * plan.blocks_per_pair, p.num_kv_heads),
                 .threads = plan.threads,
                 .shared_bytes = kPlanBytes + plan.rank_bytes,
                 .cluster_size = grid ? grid->cluster_size : plan.blocks_per_pair,
                 .overlaps_previous = true,
                 .is_cooperative = grid.has_value()},
                stream, kOp, params);
  return true;
}

// Launches the step of codes of kNumWords words, and returns false, having done nothing, where the
// device has no clusters, or warps would attend in teams and cannot or had better not.
// instances_*.cu make this, side by side; launch.cu calls it.
template <int kNumWords>
bool launch(Params& params, CudaStream stream) {
  return params.select.code_cache.norms != nullptr ? launch<kNumWords, true>(params, stream)
                                                   : launch<kNumWords, false>(params, stream);
}

}  // namespace hata::step
