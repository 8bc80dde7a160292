#pragma once

#include "cuda/decode_step/cut.cuh"
#include "cuda/decode_step/ranks.cuh"
#include "cuda/primitives/warp.cuh"
#include "query_planes.h"

// The fourth phase: one block finds the selected positions of its slice again by comparing ranks
// with the cut, and writes them in order. Ties go to the most recent positions.
namespace hata::step {

// How many ranks lie above the cut, and how many equal it.
struct RankCounts {
  uint32_t above, ties;
};

// The positions of one tile of a slice that this thread looks at, consecutive ones, and how their
// ranks compare with a range, in the end with the cut. Threads follow one another as their
// positions do. Few instructions matter: every warp of the block goes through them, whatever it
// finds.
class ComparedRanks {
 public:
  static constexpr int kWords = 4;  // of bits: 128 positions a thread, in registers

  // Returns how many positions a whole block looks at.
  __device__ static int tile_positions() { return blockDim.x * kMostPieces * 8; }

  // Returns the 16-byte pieces of a thread for a slice of so many positions: an odd number, so that
  // the threads of a warp meet no bank conflict.
  __device__ static int pieces_for(int positions) {
    return min(ceil_div(positions, static_cast<int>(blockDim.x) * 8) | 1, kMostPieces);
  }

  // Compares a tile. `ranks` are those from slice.begin on; a multiple of 8 of them can be read.
  template <bool kNorms>
  __device__ __forceinline__ void compare(const uint16_t* ranks, const CompetingSlice& slice,
                                          int tile, int pieces, const RankRange& range) {
    first_ = tile + static_cast<int>(threadIdx.x) * pieces * 8;
    num_words_ = 0;
#pragma unroll
    for (RankBits& word : words_) word = {};
    const int end = min(first_ + pieces * 8, slice.end);
#pragma unroll 1
    for (int position = first_; position < end; position += 32) {
      RankBits word{};
#pragma unroll
      for (int i = 0; i < 32; i += 8) {
        if (position + i >= end) break;
        const RankBits bits = compare_ranks<kNorms>(ranks + (position + i - slice.begin), range);
        word.above |= bits.above << i, word.within |= bits.within << i;
      }
      const uint32_t competing = slice.competing(position);
      word.above &= competing, word.within &= competing;
#pragma unroll
      for (int w = 0; w < kWords; ++w) words_[w] = num_words_ == w ? word : words_[w];
      ++num_words_;
    }
  }

  // Narrows the range to one rank. rank_of(position) is the rank of a position in the range.
  template <typename Fn>
  __device__ __forceinline__ void narrow(uint32_t cut, const Fn& rank_of) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t rest = words_[w].within;
#pragma unroll 1
      for (; rest != 0; rest &= rest - 1) {
        const int i = __ffs(rest) - 1;
        const uint32_t rank = rank_of(first_ + w * 32 + i);
        if (rank > cut) words_[w].above |= 1u << i;
        if (rank != cut) words_[w].within &= ~(1u << i);
      }
    }
  }

  // Takes `count` words from where the positions of this thread begin, and leaves zeros.
  __device__ __forceinline__ void take(uint32_t* above, uint32_t* ties, int first, int count) {
    first_ = first, num_words_ = count;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words_[w] = {};
      if (w >= count) continue;
      words_[w] = {above[w], ties[w]};
      above[w] = ties[w] = 0;
    }
  }

  __device__ __forceinline__ RankCounts count() const {
    RankCounts counts{};
#pragma unroll
    for (const RankBits& word : words_) {
      counts.above += __popc(word.above), counts.ties += __popc(word.within);
    }
    return counts;
  }

  // Calls fn(position) for the positions whose rank is in the range.
  template <typename Fn>
  __device__ __forceinline__ void for_each_within(const Fn& fn) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll 1
      for (uint32_t rest = words_[w].within; rest != 0; rest &= rest - 1) {
        fn(first_ + w * 32 + __ffs(rest) - 1);
      }
    }
  }

  // Calls fn(first position, bits) for each word, in order.
  template <typename Fn>
  __device__ __forceinline__ void for_each_word(const Fn& fn) const {
#pragma unroll 1
    for (int w = 0; w < num_words_; ++w) {
      RankBits word = words_[0];
#pragma unroll
      for (int other = 1; other < kWords; ++other) word = w == other ? words_[other] : word;
      fn(first_ + w * 32, word);
    }
  }

 private:
  static constexpr int kMostPieces = 15;  // odd, and within kWords

  int first_;
  int num_words_;
  RankBits words_[kWords];  // bit i of word w: position first_ + 32 w + i
};

// Returns the counts of the threads before this one, and in `total` those of the whole block. A
// thread counts less than 2048 ranks. A barrier must lie between two calls.
__device__ __forceinline__ RankCounts scan_counts(const RankCounts& mine, RankCounts& total) {
  __shared__ uint32_t warp_counts[2][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t both = mine.above | mine.ties << 16;
  const uint32_t inclusive = warp_inclusive_scan(both);
  if (lane == kWarpSize - 1) {
    warp_counts[0][warp] = inclusive & 0xffffu;
    warp_counts[1][warp] = inclusive >> 16;
  }
  __syncthreads();
  const bool counts = lane * kWarpSize < blockDim.x;
  const uint32_t above = counts ? warp_counts[0][lane] : 0;
  const uint32_t ties = counts ? warp_counts[1][lane] : 0;
  total = {__reduce_add_sync(kFullMask, above), __reduce_add_sync(kFullMask, ties)};
  const uint32_t before = inclusive - both;
  return {__reduce_add_sync(kFullMask, lane < warp ? above : 0) + (before & 0xffffu),
          __reduce_add_sync(kFullMask, lane < warp ? ties : 0) + (before >> 16)};
}

// Some entries of one query token's list of indices.
struct IndexRange {
  int first, end;
};

// One query token's list of indices in global memory, and in shared memory the first of those that
// this block writes, from entry `first` on.
struct IndexList {
  int32_t* all;
  int32_t* kept;
  int num_kept;
  int first;

  __device__ __forceinline__ void write(int entry, int position) const {
    all[entry] = position;
    if (entry - first < num_kept) kept[entry - first] = position;
  }
};

// Where a slice's part of the selection begins.
struct OutputCut {
  uint32_t rank;          // of the last selected position
  uint32_t above_before;  // ranks above it in the slices before this one
  uint32_t ties_before;   // ranks equal to it there
  uint32_t ties_to_skip;  // of all the ranks equal to it, how many of the first are not selected

  __device__ int selected_before() const {
    return above_before + (ties_before > ties_to_skip ? ties_before - ties_to_skip : 0);
  }
};

// Writes the selected positions of a tile, in order, by a whole block: all whose rank lies above
// the cut, and of the ties all but the first, from entry `first_entry` of the list on. Advances the
// cut past the tile. A barrier must lie between two calls.
__device__ __forceinline__ void write_selected(const ComparedRanks& ranks, OutputCut& cut,
                                               int first_entry, const IndexList& list) {
  RankCounts total;
  const RankCounts before = scan_counts(ranks.count(), total);
  uint32_t num_ties = cut.ties_before + before.ties;
  int entry = first_entry + cut.above_before + before.above +
              (num_ties > cut.ties_to_skip ? num_ties - cut.ties_to_skip : 0);
  ranks.for_each_word([&](int first, RankBits word) {
#pragma unroll 1
    for (; word.within != 0 && num_ties < cut.ties_to_skip; ++num_ties) {
      word.within &= word.within - 1;
    }
#pragma unroll 1
    for (uint32_t rest = word.above | word.within; rest != 0; rest &= rest - 1) {
      list.write(entry++, first + __ffs(rest) - 1);
    }
  });
  cut.above_before += total.above;
  cut.ties_before += total.ties;
}

// Says how the selection of one query token ended, where that is asked for, by one thread.
template <bool kNorms>
__device__ __forceinline__ void write_cut(const ScoreSelectParams& p, int64_t list_idx,
                                          const Cut& cut) {
  const auto ties = static_cast<int32_t>(cut.ties);
  if constexpr (kNorms) {
    p.cut.write(list_idx, float16_of_rank(static_cast<uint16_t>(cut.bin)), ties);
  } else {
    p.cut.write(list_idx, score_of_matches(static_cast<int>(cut.bin), p.max_matches()), ties);
  }
}

// Where the selection finds the ranks again that the scan kept is up to a source: RankSource, or
// CandidateSource (candidates.cuh). This one has all of them in shared memory.
template <typename AllRanks, bool kNorms>
struct RankSource {
  static constexpr bool kHasNorms = kNorms;
  AllRanks all;
  int pieces;  // of a thread (ComparedRanks)

  // Calls fn(rank) for every rank in the range, and leaves in `compared` what the last tile has.
  template <typename Fn>
  __device__ __forceinline__ void for_each_within(int token_idx, const CompetingSlice& slice,
                                                  const RankRange& range, ComparedRanks& compared,
                                                  const Fn& fn) const {
    const uint16_t* ranks = all.ranks + token_idx * all.pitch;
#pragma unroll 1
    for (int tile = slice.begin; tile < slice.end; tile += tile_positions()) {
      compared.template compare<kNorms>(ranks, slice, tile, pieces, range);
      compared.for_each_within(
          [&](int position) { fn(KeptRanks<kNorms>::rank(ranks[position - slice.begin])); });
    }
  }

  __device__ __forceinline__ int tile_positions() const { return ComparedRanks::tile_positions(); }

  // Compares a tile with the cut. With from_range, it has been compared with a range that holds the
  // cut.
  __device__ __forceinline__ void compare(int token_idx, const CompetingSlice& slice, int tile,
                                          uint32_t cut, bool from_range,
                                          ComparedRanks& compared) const {
    const uint16_t* ranks = all.ranks + token_idx * all.pitch;
    if (!from_range)
      return compared.template compare<kNorms>(ranks, slice, tile, pieces, {cut, cut});
    compared.narrow(
        cut, [&](int position) { return KeptRanks<kNorms>::rank(ranks[position - slice.begin]); });
  }
};

// Writes this block's part of the indices of every query token, and of the last one also the first
// num_kept entries to `kept`, by a whole block, after the cuts and a barrier. find_fine_cuts()
// finds them within the bins of the first histogram, from the second one, between barriers. Returns
// which entries of the last query token are this block's.
template <typename Source, typename FindFineCuts>
__device__ __forceinline__ IndexRange select_from(const Params& params, SharedPlan& shared,
                                                  const Source& source,
                                                  const FindFineCuts& find_fine_cuts, int32_t* kept,
                                                  int num_kept) {
  const ScoreSelectParams& p = params.select;
  const Slice& slice = shared.slice;
  const int shift = params.bins.shift, fine_bins = params.bins.counts[1];
  const auto visible = [&](int j) { return visible_len(slice.seq_len, p.q_len, j); };
  const auto competing_slice = [&](int j) -> CompetingSlice {
    return {slice.begin, slice.end, p.num_sink, visible(j) - p.num_recent};
  };
  // If a token's slice is one tile, it is compared once for both histograms.
  const bool one_tile = p.q_len == 1 && slice.end - slice.begin <= source.tile_positions();
  ComparedRanks compared;
  if (shift > 0 && must_choose(p, slice.seq_len)) {
    for (int i = threadIdx.x; i < p.q_len * fine_bins; i += blockDim.x) shared.histogram[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int j = 0; j < p.q_len; ++j) {
      if (!must_choose(p, visible(j))) continue;
      const uint32_t first = shared.cuts[j].bin << shift, low_bits = (1u << shift) - 1;
      source.for_each_within(j, competing_slice(j), {first, first | low_bits}, compared,
                             [&](uint32_t rank) {
                               atomicAdd(&shared.histogram[j * fine_bins + (rank & low_bits)], 1u);
                             });
    }
    __syncthreads();
    find_fine_cuts();
    __syncthreads();
  }

  IndexRange range{};
#pragma unroll 1
  for (int j = 0; j < p.q_len; ++j) {
    const int64_t list_idx = slice.first_list + j * p.num_kv_heads;
    const int most = budget(p, visible(j)), num_selected = min(most, visible(j));
    IndexList list{p.indices + list_idx * p.top_k, kept, num_kept, 0};
    if (slice.place.block == 0) {
      if (threadIdx.x == 0) {
        p.num_selected[list_idx] = num_selected;
        write_cut<Source::kHasNorms>(p, list_idx,
                                     must_choose(p, visible(j)) ? shared.cuts[j] : Cut{});
      }
      for (int i = num_selected + threadIdx.x; i < p.top_k; i += blockDim.x) list.all[i] = -1;
    }
    const bool all_selected = visible(j) <= most;
    // If not all are selected, the sinks and the recent ones do not overlap.
    const int first_recent = all_selected ? 0 : visible(j) - p.num_recent;
    const int num_sink = all_selected ? 0 : p.num_sink;
    const int competing = num_competing(p, visible(j));
    const bool competes = !all_selected && competing > 0;
    const Cut cut = competes ? shared.cuts[j] : Cut{};
    OutputCut output{cut.bin, cut.above_before, cut.ties_before,
                     competes ? cut.ties - (competing - cut.above) : 0};
    const auto selected_before = [&](int position) {
      return min(position, num_sink) + output.selected_before() +
             min(max(position - first_recent, 0), visible(j) - first_recent);
    };
    list.first = range.first = selected_before(slice.begin);
#pragma unroll 1
    for (int t = slice.begin + threadIdx.x; t < min(slice.end, num_sink); t += blockDim.x) {
      list.write(t, t);
    }
#pragma unroll 1
    for (int t = max(slice.begin, first_recent) + threadIdx.x; t < min(slice.end, visible(j));
         t += blockDim.x) {
      list.write(num_selected - visible(j) + t, t);
    }
#pragma unroll 1
    for (int tile = slice.begin; competes && tile < slice.end; tile += source.tile_positions()) {
      source.compare(j, competing_slice(j), tile, cut.bin, shift > 0 && one_tile, compared);
      if (!one_tile) __syncthreads();
      write_selected(compared, output, num_sink, list);
    }
    range.end = selected_before(slice.end);
  }
  return range;
}

}  // namespace hata::step
