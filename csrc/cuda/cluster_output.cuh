#pragma once

#include <cuda_fp16.h>

#include "cuda/block_scan.cuh"
#include "cuda/check.h"

// How one block of a cluster finds the selected positions of its slice again, in order.
namespace hata {

// One block's part of a row of keys. Positions outside first..last do not compete.
struct KeySlice {
  const uint16_t* keys;  // of position `begin` on; a multiple of 8 of them can be read
  int begin, end;
  int first, last;
  bool are_small;  // all keys are below kSmallKeys
};

// Smaller keys are compared as numbers of type float16, whose order is theirs, two in one
// instruction: infinity and NaN begin here.
constexpr int kSmallKeys = 0x7c00;

// Bit i of the result: is key i of eight at least `least`?
__device__ __forceinline__ uint32_t compare_keys(const uint4& eight, uint32_t least, bool small) {
  const uint32_t pairs[] = {eight.x, eight.y, eight.z, eight.w};
  uint32_t bits = 0;
  if (small) {
    const __half2 both = __half2half2(__ushort_as_half(static_cast<uint16_t>(least)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits |= __hge2_mask(reinterpret_cast<const __half2&>(pairs[i]), both) & (0x20001u << 2 * i);
    }
    return (bits | bits >> 16) & 0xffu;
  }
  const uint32_t high = least << 16;  // what is below the upper key of a pair does not matter
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (pairs[i] << 16 >= high) bits |= 1u << 2 * i;
    if (pairs[i] >= high) bits |= 2u << 2 * i;
  }
  return bits;
}

// The positions of one tile of a slice that this thread looks at, consecutive ones, and which of
// them may be selected. Threads follow one another as their positions do. Loops are not unrolled,
// and few instructions matter: every warp of the block goes through them, whatever it finds.
class Candidates {
 public:
  // Positions of a tile, by a whole block.
  __device__ static int tile_positions() { return blockDim.x * kMostPieces * 8; }

  // 16-byte pieces of a thread for a slice of so many positions: an odd number, so that the threads
  // of a warp meet no bank conflict.
  __device__ static int pieces_for(int positions) {
    return min(ceil_div(positions, static_cast<int>(blockDim.x) * 8) | 1, kMostPieces);
  }

  // Finds those of the tile whose key is at least `least`.
  __device__ __forceinline__ void mark(const KeySlice& slice, int tile, int pieces,
                                       uint32_t least) {
    first_ = tile + static_cast<int>(threadIdx.x) * pieces * 8;
    const int stop = min(slice.last, slice.end);
    const int end = first_ + pieces * 8;
    const bool is_edge = first_ < slice.first || end > stop;
    num_words_ = 0;
    words_[0] = words_[1] = words_[2] = words_[3] = 0;
#pragma unroll 1
    for (int position = first_; position < min(end, stop); position += 32) {
      uint32_t word = 0;
#pragma unroll 1
      for (int i = 0; i < 32 && position + i < min(end, stop); i += 8) {
        const auto* eight =
            reinterpret_cast<const uint4*>(slice.keys + (position + i - slice.begin));
        word |= compare_keys(*eight, least, slice.are_small) << i;
      }
      if (is_edge) {
        if (position < slice.first) {
          word = position + 32 <= slice.first ? 0 : word & ~0u << (slice.first - position);
        }
        if (position + 32 > stop) word &= ~0u >> (position + 32 - stop);
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) words_[w] = num_words_ == w ? word : words_[w];
      ++num_words_;
    }
  }

  // Calls fn(position, key) for each of them, in order.
  template <typename Fn>
  __device__ __forceinline__ void for_each(const KeySlice& slice, const Fn& fn) const {
#pragma unroll 1
    for (int w = 0; w < num_words_; ++w) {
      uint32_t rest = words_[0];
#pragma unroll
      for (int other = 1; other < kWords; ++other) rest = w == other ? words_[other] : rest;
      const int first = first_ + w * 32;
#pragma unroll 1
      for (; rest != 0; rest &= rest - 1) {
        const int position = first + __ffs(rest) - 1;
        fn(position, static_cast<uint32_t>(slice.keys[position - slice.begin]));
      }
    }
  }

 private:
  static constexpr int kMostPieces = 15;
  static constexpr int kWords = 4;

  int first_;
  int num_words_;
  uint32_t words_[kWords];  // bit i of word w: position first_ + 32 w + i
};

// How many keys lie above the cut, and how many equal it.
struct KeyCounts {
  uint32_t above, ties;
};

// The counts of the threads before this one, and in `total` those of the whole block. A thread
// counts less than 2048 keys.
__device__ __forceinline__ KeyCounts scan_counts(const KeyCounts& mine, KeyCounts& total) {
  __shared__ uint32_t warp_counts[2][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t both = mine.above | mine.ties << 16;
  const uint32_t inclusive = warp_inclusive_scan(both);
  __syncthreads();  // the last scan's counts have been read
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

// Entries of a row of indices.
struct IndexRange {
  int first, end;
};

// A row of indices in global memory, and in shared memory the first of those that this block
// writes, from entry `first` on.
struct IndexRow {
  int32_t* all;
  int32_t* kept;
  int num_kept;
  int first;

  __device__ __forceinline__ void write(int entry, int position) const {
    all[entry] = position;
    if (entry - first < num_kept) kept[entry - first] = position;
  }
};

// Where the selection of one slice of a sequence begins and ends.
struct OutputCut {
  uint32_t key;           // the last selected key
  uint32_t above_before;  // keys above it in the slices before this one
  uint32_t ties_before;   // keys equal to it there
  uint32_t ties_to_skip;  // of all the keys equal to it, how many of the first are not selected

  __device__ int selected_before() const {
    return above_before + (ties_before > ties_to_skip ? ties_before - ties_to_skip : 0);
  }
};

// Writes the selected positions of a tile, in order, by a whole block: the candidates whose key
// lies above the cut, and of the ties all but the first, from entry `first_entry` of the row on.
// Advances the cut past the tile.
__device__ __forceinline__ void write_selected(const Candidates& candidates, const KeySlice& slice,
                                               OutputCut& cut, int first_entry,
                                               const IndexRow& row) {
  KeyCounts mine{};
  candidates.for_each(slice, [&](int, uint32_t key) {
    mine.above += key > cut.key;
    mine.ties += key == cut.key;
  });
  KeyCounts total;
  const KeyCounts before = scan_counts(mine, total);
  uint32_t num_above = cut.above_before + before.above;
  uint32_t num_ties = cut.ties_before + before.ties;
  candidates.for_each(slice, [&](int position, uint32_t key) {
    if (key < cut.key) return;
    const bool tied = key == cut.key;
    if (!tied || num_ties >= cut.ties_to_skip) {
      const uint32_t ties_selected = num_ties > cut.ties_to_skip ? num_ties - cut.ties_to_skip : 0;
      row.write(first_entry + num_above + ties_selected, position);
    }
    num_above += !tied;
    num_ties += tied;
  });
  cut.above_before += total.above;
  cut.ties_before += total.ties;
}

}  // namespace hata
