#pragma once

#include "cuda/codes/matches.cuh"
#include "cuda/codes/token_sums.cuh"
#include "cuda/decode_step/plan.cuh"
#include "cuda/decode_step/ranks.cuh"

// The second phase: a block scores the codes of its slice for every query token, keeps 16-bit ranks
// and counts them in a histogram.
namespace hata::step {

// Units that a thread scores at a time: at most 64 bytes and eight positions, and less where
// registers are short.
constexpr int units_per_thread(int num_words, bool norms, KernelKind kind) {
  const bool is_short =
      norms || kind == KernelKind::kOneToken || (kind == KernelKind::kTokens && num_words > 1);
  const int units = num_words == 2 ? 4 : num_words <= 4 ? 2 : 1;
  return is_short && num_words <= 2 ? units / 2 : units;
}

// What a scan keeps of the ranks is up to a keeper: AllRanks, or Candidates (candidates.cuh). For
// each query token it has a run of a thread's next positions, which is shown every pair of ranks,
// says which of them it takes, and is given those of them that compete: to be counted in the
// histogram now, or in a list from which they are counted later.

// Keeps all ranks, those of a query token `pitch` behind those of the one before it.
template <int kNumWords, bool kNorms, KernelKind kKind>
struct AllRanks {
  using Chunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords, kNorms, kKind)>;

  uint16_t* ranks;  // [q_len, pitch] in shared memory, from the beginning of the slice on
  int pitch;

  struct Run {
    uint16_t* ranks;

    // `exist` says that the positions do; ranks of those that do not compete may be anything.
    __device__ __forceinline__ void keep(int, int offset, uint32_t pair, bool exist) const {
      if (exist) *reinterpret_cast<uint32_t*>(ranks + offset) = pair;
    }
    __device__ __forceinline__ Pair<bool> takes(const KeptPair&) const { return {true, true}; }
    __device__ __forceinline__ void add(uint32_t* bin, uint32_t, int) const { atomicAdd(bin, 1u); }
    __device__ __forceinline__ void finish() const {}
  };

  // `offset` is where in the slice the thread's first position is.
  __device__ __forceinline__ Run run(const SharedPlan&, int token_idx, int offset, int) const {
    return {ranks + token_idx * pitch + offset};
  }
};

// Keeps the ranks that a thread's kPositions positions, the first of them `position`, have for one
// query token, and counts those that compete (neither sink nor recent, and before `last`) in the
// histogram. All positions of a chunk that is no edge compete, for every token. kept_pair(i) is
// what is kept of positions i and i + 1.
template <bool kEdge, bool kNorms, int kPositions, int kUnitTokens, typename Run, typename Fn>
__device__ __forceinline__ void keep_ranks(const Params& params, Run run, int position, int last,
                                           uint32_t* histogram, const Fn& kept_pair) {
  const ScoreSelectParams& p = params.select;
#pragma unroll
  for (int i = 0; i < kPositions; i += 2) {
    const int offset = i / kUnitTokens * kWarpSize * kUnitTokens + i % kUnitTokens;
    const KeptPair kept = kept_pair(i);
    run.keep(i, offset, kept.pair, !kEdge || position + offset < last);  // positions here are even
    const Pair<uint32_t> ranks = KeptRanks<kNorms>::ranks(kept);
    const Pair<bool> takes = run.takes(kept);
    const auto add = [&](int t, bool is_taken, uint32_t rank, uint32_t kept_rank) {
      const int mine = position + offset + t;
      if (is_taken && (!kEdge || (mine >= p.num_sink && mine < last))) {
        run.add(histogram + (rank >> params.bins.shift), kept_rank, i + t);
      }
    };
    add(0, takes.first, ranks.first, kept.first);
    add(1, takes.second, ranks.second, kept.second);
  }
  run.finish();
}

// Scores one chunk for every query token, one after another.
template <bool kEdge, bool kTokens, typename Keeper, int kNumWords, bool kNorms, int kUnits>
__device__ __forceinline__ void score_chunk(const Params& params, SharedPlan& shared,
                                            const Slice& slice, const Keeper& keeper,
                                            int num_planes,
                                            const CodeChunk<kNumWords, kNorms, kUnits>& chunk,
                                            int first_position) {
  using Unit = CodeUnit<kNumWords>;
  constexpr int kPositions = kUnits * Unit::kTokens, kNumBits = kNumWords * kWordBits;
  const ScoreSelectParams& p = params.select;
  const ScanTables& tables = shared.scan.tables;
  const int plane_pitch = padded_planes(num_planes) * kNumWords;
  int offsets[kPositions];
  offset_matches(chunk.units, num_planes, p.weight_sum, offsets);
  const int q_len = kTokens ? p.q_len : 1;
#pragma unroll 1
  for (int j = 0; j < q_len; ++j) {
    int matches[kPositions];
    count_matches(chunk.units, offsets,
                  {plane_column<kNumWords>(tables.planes + j * plane_pitch, tables.no_planes),
                   tables.weights, num_planes, tables.bases[j]},
                  matches);
    const int position = chunk.position_of(first_position, 0);
    const auto run = keeper.run(shared, j, position - slice.begin, first_position - slice.begin);
    const int last = min(visible_len(slice.seq_len, p.q_len, j) - p.num_recent, slice.end);
    keep_ranks<kEdge, kNorms, kPositions, Unit::kTokens>(
        params, run, position, last, shared.histogram + j * params.bins.counts[0], [&](int i) {
          if constexpr (!kNorms) return KeptRanks<false>::pair(matches[i], matches[i + 1]);
          const auto minus_score = [&](int n) {
            return score_per_bit<kNumBits>(
                static_cast<float>(p.weight_sum * kNumBits - 2 * matches[n]));
          };
          return KeptRanks<true>::pair(minus_score(i), minus_score(i + 1), chunk.norms[i / 2]);
        });
  }
}

// Scores one chunk for every query token, kTokensAtOnce of them at a time.
template <bool kEdge, typename Keeper, int kNumWords, bool kNorms, int kUnits>
__device__ __forceinline__ void score_chunk_at_once(
    const Params& params, SharedPlan& shared, const Slice& slice, const Keeper& keeper,
    const CodeChunk<kNumWords, kNorms, kUnits>& chunk, int first_position) {
  using Unit = CodeUnit<kNumWords>;
  constexpr int kPositions = kUnits * Unit::kTokens, kNumBits = kNumWords * kWordBits;
  const ScoreSelectParams& p = params.select;
  const TokenColumn column(shared.scan.token_weights);
  const int position = chunk.position_of(first_position, 0);
  const int chunk_offset = first_position - slice.begin, offset = position - slice.begin;
#pragma unroll 1
  for (int first = 0; first < p.q_len; first += kTokensAtOnce) {
    const TokenSums<kPositions> sums = sum_tokens(chunk.units, column, first);
#pragma unroll
    for (int t = 0; t < kTokensAtOnce; ++t) {
      const int j = first + t;
      if (j >= p.q_len) break;
      const int base = shared.scan.tables.bases[j];
      const int last = min(visible_len(slice.seq_len, p.q_len, j) - p.num_recent, slice.end);
      keep_ranks<kEdge, kNorms, kPositions, Unit::kTokens>(
          params, keeper.run(shared, j, offset, chunk_offset), position, last,
          shared.histogram + j * params.bins.counts[0], [&](int i) {
            if constexpr (!kNorms) {
              return KeptRanks<false>::pair(base + sums.sum(i, t), base + sums.sum(i + 1, t));
            }
            const auto minus_score = [&](int n) {
              return sums.template minus_score_per_bit<kNumBits>(
                  n, t, static_cast<float>(p.weight_sum * kNumBits - 2 * base));
            };
            return KeptRanks<true>::pair(minus_score(i), minus_score(i + 1), chunk.norms[i / 2]);
          });
    }
  }
}

// Which chunks a warp scores: from position `first` on, before `end`, those of the block's warps
// alternating.
struct WarpChunks {
  int first, end;
};

// Returns the chunks of a warp when its block scores the whole slice.
__device__ __forceinline__ WarpChunks chunks_of_slice(const Slice& slice, int positions) {
  const int warp = threadIdx.x / kWarpSize;
  return {slice.begin + warp * positions, slice.end};
}

// Scores the chunks, by every warp of a block. What a warp reads next is on its way to L2 while it
// scores: that keeps more bytes in flight than its registers could.
template <int kNumWords, bool kNorms, bool kTokens, typename Keeper>
__device__ __forceinline__ void scan(const Params& params, SharedPlan& shared, const Slice& slice,
                                     const Keeper& keeper, const WarpChunks& chunks) {
  using Chunk = typename Keeper::Chunk;
  const ScoreSelectParams& p = params.select;
  const CodeReader<kNumWords> reader(p.table, p.code_cache, slice.batch_idx, slice.kv_head_idx,
                                     slice.only_page);
  const int num_planes = shared.scan.tables.num_planes;
  const bool at_once = kTokens && scores_at_once<kNumWords>(p.q_len, p.weight_sum);
  const int step = blockDim.x * (Chunk::kPositions / kWarpSize);
  for (int first = chunks.first; first < chunks.end; first += step) {
    const int stop = first + Chunk::kPositions;
    if (reader.has_whole_units() && stop <= p.table.capacity) {
      Chunk chunk;
      reader.load_whole(chunk, first);
      reader.template prefetch<kNorms, Chunk::kPositions>(first + step, slice.end);
      const bool is_edge = first < p.num_sink || stop > slice.last;
      const auto score = [&]<bool kEdge>() {
        if constexpr (kTokens) {
          if (at_once)
            return score_chunk_at_once<kEdge>(params, shared, slice, keeper, chunk, first);
        }
        score_chunk<kEdge, kTokens>(params, shared, slice, keeper, num_planes, chunk, first);
      };
      is_edge ? score.template operator()<true>() : score.template operator()<false>();
    } else {
      using Part = CodeChunk<kNumWords, kNorms, 1>;
#pragma unroll 1
      for (int part = first; part < min(stop, slice.end); part += Part::kPositions) {
        Part chunk;
        reader.load_part(chunk, part, slice.end);
        score_chunk<true, kTokens>(params, shared, slice, keeper, num_planes, chunk, part);
      }
    }
  }
}

}  // namespace hata::step
