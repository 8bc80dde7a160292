#pragma once

#include <algorithm>
#include <cstddef>

#include "cuda/attention/merge.cuh"
#include "cuda/codes/matches.cuh"
#include "cuda/codes/token_sums.cuh"
#include "cuda/primitives/cluster.cuh"
#include "decode_step.h"
#include "selection.h"

// The plan of the fused step: what it is told, how it is cut, and what a block has in shared
// memory.
//
// A cluster of up to eight blocks serves one (sequence, KV head), a pair, each block one slice of
// the sequence; where pairs are few, the blocks of the whole grid share them. A block goes through
// these phases, each in a file of its own:
//
//   encode      queries become bit planes, the new tokens' keys become codes
//   scan        every code of the slice becomes a rank, counted in a histogram
//   cut         the cluster finds the rank of its last selected position
//   select      each block writes its part of the indices, in order
//   attend      each block attends over them, and the cluster merges the results
//   candidates  what scan and select do instead where ranks do not fit into shared memory
//   exchange    what cut and attend do instead where the blocks of a pair are no cluster
//
// A rank is a 16-bit number with the order of the scores. With norms it is the float16 score as
// ordered_rank_float16() maps it, otherwise the score's count of matches.
namespace hata::step {

constexpr int kMaxTokens = 8;         // query tokens: one product encodes their keys
constexpr int kMaxStepHeadDim = 256;  // eight channels a lane
// Positions of a thread: half a word of a CandidateList says which of them an entry is of.
constexpr int kMostPlaces = 1 << 16;

constexpr int kMaxAttendHeads = 16;  // query heads of a KV head that the step attends with itself

// Whether the fused step can attend. With a softcap gather_attention does: a branch for it here
// costs every step (docs/kernels/log.md).
constexpr bool can_attend(const GatherAttentionParams& p) {
  return p.q_len == 1 && group_of(p) <= kMaxAttendHeads && p.softcap == 0.0f;
}

// What the registers of a warp are cut for: as many query heads as one matrix product has, and so
// many channels of their output. What is larger, warps attend over in teams.
constexpr int kMaxWarpHeads = kTileHeads;
constexpr int kMaxWarpHeadDim = 128;
constexpr bool needs_teams(const GatherAttentionParams& p) {
  return group_of(p) > kMaxWarpHeads || p.cache.head_dim > kMaxWarpHeadDim;
}

// What a kernel is for. Each has the code for its case alone: small steps are bound by how much
// machine code they go through.
enum class KernelKind {
  kRanksFit,  // one query token, and the ranks of a full cache fit into shared memory
  kOneToken,  // one query token, any cache
  kTokens,    // several query tokens, any cache
  kGrid,      // as kRanksFit, and the blocks of the whole grid share the pairs
  kTeams,     // as kRanksFit or kGrid, whichever the launch is cut for, and warps attend in teams
};

// Threads of a block where two blocks share a multiprocessor; one that has it to itself has twice
// as many. With several query tokens a thread has more sums to keep, in a team two tiles of heads,
// and 128 registers for them instead of 96.
constexpr int few_threads(KernelKind kind) {
  return kind == KernelKind::kTokens || kind == KernelKind::kTeams ? 256 : 320;
}
constexpr int many_threads(KernelKind kind) {
  return 2 * few_threads(kind);
}

// How ranks become bins: rank >> shift, and where shift > 0 a second histogram of the low bits of
// the ranks in the bin at the cut. Bins are told to other blocks in groups, one bin a lane.
struct Bins {
  int counts[2];  // of the two histograms of one query token, multiples of kGroupBins
  int shift;
};
constexpr int kGroupBins = kWarpSize;
// Bins of all query tokens together: 16 KB. Without norms that is one for every rank of 256 bits
// and four query bits (3841).
constexpr int kHistogramBins = 4096;
constexpr int kMaxGroups = kHistogramBins / kGroupBins;

// Keys and values of a tile in shared memory.
constexpr int stage_bytes(int channels, DType dtype) {
  return 2 * kTileRows * (channels * (dtype == DType::kFloat8E4M3 ? 1 : 2) + 16);
}

// How warps attend in teams, and their shared memory, in the place of the rows: results that other
// blocks send; queries; rows or, after them, what the teams found. A warp of a team has
// kTeamChannels of a row's channels; where head_dim is no multiple of them, the last two warps have
// some channels both.
constexpr int kTeamChannels = 64;
constexpr int kTeamHeads = kMaxAttendHeads;
constexpr int kTeamStages = 2;
struct TeamPlan {
  int size;           // warps of a team
  int num_teams;      // of a block; the warps that are left over have no rows
  int stages;         // tiles in flight a warp, at most kTeamStages
  int queries, rows;  // where they begin, in bytes
  int bytes;
};
constexpr TeamPlan team_plan(int threads, int group, int head_dim, DType dtype, int stages) {
  TeamPlan plan{.size = (head_dim + kTeamChannels - 1) / kTeamChannels, .stages = stages};
  plan.num_teams = threads / kWarpSize / plan.size;
  plan.queries = Received::most_bytes(group, head_dim);
  plan.rows = plan.queries + plan.size * kTeamHeads * (kTeamChannels + 8) * 2;
  plan.bytes =
      plan.rows + std::max(threads / kWarpSize * stages * stage_bytes(kTeamChannels, dtype),
                           Partials::bytes(plan.num_teams, group, head_dim));
  return plan;
}

struct Params {
  ScoreSelectParams select;
  bool encodes;  // the planes come from `encode`, not from select.planes, and `append` is done
  EncodeQueryParams encode;
  CacheAppendParams append;
  int group;  // query heads of a KV head
  Bins bins;
  int rank_bytes;             // of shared memory behind SharedPlan
  int row_end;                // where in shared memory the rows that are attended over end
  int num_bit_words;          // of each half of TileBits
  int list_bytes, list_full;  // of CandidateList, for one query token
  bool attends;               // over what it selected, as `attend` says: one query token
  GatherAttentionParams attend;
  int blocks_per_pair;  // kGrid
  int grid_from;        // kGrid: the shortest sequence that all blocks of a pair share
  TeamPlan teams;       // kTeams
  float late_cycles;    // kRanksFit: what half of the pairs wait for 1024 tokens; 0: nothing
};
// A shorter wait before the scan gains nothing.
constexpr int kLeastLateCycles = 4000;

// Which of the blocks of its pair a block is.
struct Place {
  int block, num_blocks;
};

// One block's part of a (sequence, KV head).
struct Slice {
  Place place;
  int64_t first_list;  // of the outputs: query token 0; the next token's is num_kv_heads later
  int batch_idx, kv_head_idx;
  int seq_len;
  int only_page;
  int begin, end;  // positions
  int last;        // those that compete for every query token are before it
  int length;      // of all slices but the last
};
constexpr int kSliceAlignment = 32;  // positions: a word of ComparedRanks
// Positions of a slice where the blocks of the grid share a sequence, as long as there are blocks:
// with 2K to 4K an H100 was fastest, more of them have more to tell each other.
constexpr int kGridSlice = 4096;
// Positions that a block of an H100 serves in the time by which telling each other things takes
// longer in a grid than in a cluster. By the times at 64K and 128K tokens of one pair, both are as
// fast at 105K (docs/kernels/score_select.md).
constexpr int kGridCost = 12 * 1024;

// Returns the shortest sequence that is served faster by so many blocks of the grid than by a
// cluster.
constexpr int shortest_for_grid(int blocks_per_pair, int cluster_size) {
  return kGridCost * cluster_size * blocks_per_pair / (blocks_per_pair - cluster_size);
}

// The bin that holds the `wanted`-th largest rank of the pair, and what the ordered output needs:
// how many ranks of the pair lie in higher bins and in this one, and how many of each belong to the
// blocks before this one.
struct Cut {
  uint32_t bin;
  uint32_t above, ties;
  uint32_t above_before, ties_before;
  bool is_counted = true;  // no block has left out ranks from its bin on
};

// The new tokens of the sequence, and their keys and values for the KV head.
struct NewTokens {
  int positions[kMaxTokens];
  Slot slots[kMaxTokens];
  uint32_t codes[kMaxTokens][kMaxWords];  // the words that this block encodes
};
struct NewRows {
  alignas(16) uint16_t k[kMaxTokens][kMaxStepHeadDim];
  alignas(16) uint16_t v[kMaxTokens][kMaxStepHeadDim];
};

// What the scan reads beside codes.
struct ScanTables {
  PlaneWeights weights;
  int num_planes;
  alignas(8) uint32_t planes[kMaxTokens * kMaxPlanes * kMaxWords];
  alignas(8) uint32_t no_planes[kMaxPlanes * kMaxWords];  // zero
  int bases[kMaxTokens];
  uint32_t largest[kMaxTokens];  // scratch of the encoding
};
constexpr int kTableWords = sizeof(ScanTables) / sizeof(uint32_t);
struct ScanInputs {
  ScanTables tables;
  TokenWeights<kMaxTokens, kMaxWords> token_weights;  // where tokens are scored at once
};

// Where ranks do not fit into shared memory, bins below a bound are not counted: this block's
// bounds, those that the others have sent, and what all have guessed from their samples.
struct Bounds {
  uint32_t mine[kMaxTokens];
  uint32_t sent[kMaxTokens][kMaxCluster];
  uint32_t guesses[kMaxTokens][kMaxCluster];
};

// What other blocks send before the cut is found: sums of groups of bins, and bounds.
struct CutInbox {
  uint32_t groups[kMaxCluster * kMaxGroups];
  Bounds bounds;
};

// What the counts at one place in the histograms of a pair's blocks add up to.
struct PairCount {
  uint32_t total = 0;   // of all blocks
  uint32_t before = 0;  // of the blocks before this one

  __device__ PairCount& operator+=(const PairCount& other) {
    total += other.total, before += other.before;
    return *this;
  }
};

// The same in kCounts places, to which the warps of a block add.
template <int kCounts>
struct PairSums {
  uint32_t total[kCounts], before[kCounts];

  __device__ PairCount of(int i) const { return {total[i], before[i]}; }
};

// What a block adds up of what the other blocks of its pair have told (kGrid): groups of bins, then
// the bins of one group, of either histogram, and an upper bound of how many positions of one slice
// are selected.
struct PairInbox {
  PairSums<kMaxGroups> groups;
  PairSums<kGroupBins> bins[2];
  uint32_t most_selected;
};

// What the attention needs from before the selection on.
struct AttendInputs {
  RowList list;
  ArrivalBarrier results_arrived;
  alignas(16) uint16_t queries[kMaxWarpHeads * (kMaxWarpHeadDim + 8)];  // of no team
};

// What the other blocks send of their results, and the rows of K and V that a block attends over.
constexpr int kMaxResultBytes = Received::bytes(kMaxCluster, kMaxWarpHeads, kMaxWarpHeadDim);
// Tiles in flight a warp: of float8 rows two, in the place of one.
constexpr int attend_stages(int element_size) {
  return element_size == 1 ? 2 : 1;
}
constexpr int attend_row_bytes(int threads, int head_dim, DType dtype) {
  return threads / kWarpSize * attend_stages(dtype == DType::kFloat8E4M3 ? 1 : 2) *
         stage_bytes(head_dim, dtype);
}

// Shared memory of a block. Addresses run down, time runs to the right; members on one line with a
// brace share a place.
//
//                   encode           scan            cut               select     attend
//   slice           written -----------------------------------------------------------------
//   ..._arrived     initialized -------------------------------------------------------------
//   attend          queries ---------------------------------------------------+- list ------
//   { cut_inbox     .                bounds          group sums        .       |
//   { pair_inbox    zero ----------- zero ---------- sums ------------ sums    |
//   { results       .                .               .                 .       |  of all blocks
//   histogram       zero ----------- counts ---------------- of low bits       +- rows, then
//   { scan          planes --------- read            .                 .       |  what the
//   { bins          .                .               of one group      .       |  warps found
//   cuts            .                .               written --------- read    |  (up to
//   new_tokens      written ------------------------ to the caches     .       |  Params::
//   new_rows        copied ------------------------- to the caches     .       |  row_end)
//   behind it       EncodeScratch    ranks or candidates ------------- read    |
//                                                                      positions ------------
//
// What shares a place never meets. No block sends bins before it knows that all others have
// scanned, or a result before it knows that all have read the group sums; bounds are not needed
// once the cuts are found. Rows take the place of everything from the histogram on once the
// positions are written, which are kept behind both ranks and rows. Where warps attend in teams,
// `attend.queries` and `results` are not used: the rows' place has both of them too (TeamPlan), and
// no block sends a result before it knows that all have selected.
struct alignas(16) SharedPlan {
  Slice slice;
  ArrivalBarrier guesses_arrived;
  ArrivalBarrier sums_arrived;
  ArrivalBarrier bins_arrived[kMaxTokens];
  AttendInputs attend;
  union {
    CutInbox cut_inbox;
    PairInbox pair_inbox;
    alignas(16) char results[kMaxResultBytes];
  };
  alignas(16) uint32_t histogram[kHistogramBins];  // [q_len, bins]
  union {
    ScanInputs scan;
    uint32_t bins[kMaxTokens][kMaxCluster * kGroupBins];
  };
  Cut cuts[kMaxTokens];
  NewTokens new_tokens;
  NewRows new_rows;

  // Params::rank_bytes of memory follow: first an EncodeScratch, then ranks [q_len, slice length]
  // or what candidates need, and at last the selected positions. Those begin behind the ranks of
  // the slice's positions and behind the rows: so many bytes from the beginning of the plan.
  __device__ static int kept_offset(int num_positions, int row_end) {
    return max(static_cast<int>(sizeof(SharedPlan)) + (num_positions + 7) / 8 * 16, row_end);
  }
};
constexpr int kPlanBytes = sizeof(SharedPlan);
constexpr int kRowOffset = offsetof(SharedPlan, histogram);
static_assert(kRowOffset % 16 == 0);

// Params::rank_bytes: the most of which two blocks fit, and the most there is. A block may have 227
// KB, a multiprocessor has 228 KB and takes 1 KB a block for itself; the kernel also has a little
// static shared memory.
constexpr int kStaticBytes = 256;
constexpr int kSharingRankBytes = 113 * 1024 - kStaticBytes - kPlanBytes;
constexpr int kMostRankBytes = 227 * 1024 - kStaticBytes - kPlanBytes;
constexpr int kKeptBytes = 4 * 1024;  // for the positions that a block selects

// The rows of all warps fit, float8 rows and their padding too.
static_assert(kRowOffset + attend_row_bytes(few_threads(KernelKind::kRanksFit), kMaxWarpHeadDim,
                                            DType::kFloat8E4M3) <=
              kPlanBytes + kSharingRankBytes);
static_assert(kRowOffset + attend_row_bytes(many_threads(KernelKind::kRanksFit), kMaxWarpHeadDim,
                                            DType::kFloat8E4M3) <=
              kPlanBytes + kMostRankBytes);
static_assert(kRowOffset + team_plan(few_threads(KernelKind::kTeams), kMaxAttendHeads,
                                     kMaxStepHeadDim, DType::kBFloat16, 1)
                               .bytes <=
              kPlanBytes + kSharingRankBytes);
static_assert(kRowOffset + team_plan(many_threads(KernelKind::kTeams), kMaxAttendHeads,
                                     kMaxStepHeadDim, DType::kBFloat16, 1)
                               .bytes <=
              kPlanBytes + kMostRankBytes);

// Positions that a token selects which sees more of them.
__device__ __forceinline__ int budget(const ScoreSelectParams& p, int visible) {
  return budget_of(visible, p.top_k, p.min_top_k, p.top_k_share);
}

// Those beside the ones that always are selected.
__device__ __forceinline__ int num_competing(const ScoreSelectParams& p, int visible) {
  return budget(p, visible) - p.num_sink - p.num_recent;
}

// A sequence whose tokens all are selected has nothing to compare.
__device__ __forceinline__ bool must_choose(const ScoreSelectParams& p, int visible) {
  return visible > budget(p, visible) && num_competing(p, visible) > 0;
}

}  // namespace hata::step
