#pragma once

#include "cuda/block_scan.cuh"
#include "cuda/cluster_keys.cuh"

// How one block of a cluster finds the selected positions of its slice again, in order.
namespace hata {

// How many keys lie above the cut, and how many equal it.
struct KeyCounts {
  uint32_t above, ties;
};

// The positions of one tile of a slice that this thread looks at, consecutive ones, and how their
// keys compare with a range, in the end with the cut. Threads follow one another as their positions
// do. Few instructions matter: every warp of the block goes through them, whatever it finds.
class ComparedKeys {
 public:
  static constexpr int kWords = 4;

  // Positions of a tile, by a whole block.
  __device__ static int tile_positions() { return blockDim.x * kMostPieces * 8; }

  // 16-byte pieces of a thread for a slice of so many positions: an odd number, so that the threads
  // of a warp meet no bank conflict.
  __device__ static int pieces_for(int positions) {
    return min(ceil_div(positions, static_cast<int>(blockDim.x) * 8) | 1, kMostPieces);
  }

  // `keys` are those from slice.begin on; a multiple of 8 of them can be read.
  template <bool kNorms>
  __device__ __forceinline__ void compare(const uint16_t* keys, const KeySlice& slice, int tile,
                                          int pieces, const KeyRange& range) {
    first_ = tile + static_cast<int>(threadIdx.x) * pieces * 8;
    num_words_ = 0;
#pragma unroll
    for (KeyBits& word : words_) word = {};
    const int end = min(first_ + pieces * 8, slice.end);
#pragma unroll 1
    for (int position = first_; position < end; position += 32) {
      KeyBits word{};
#pragma unroll
      for (int i = 0; i < 32; i += 8) {
        if (position + i >= end) break;
        const KeyBits bits = compare_keys<kNorms>(keys + (position + i - slice.begin), range);
        word.above |= bits.above << i, word.within |= bits.within << i;
      }
      const uint32_t competing = slice.competing(position);
      word.above &= competing, word.within &= competing;
#pragma unroll
      for (int w = 0; w < kWords; ++w) words_[w] = num_words_ == w ? word : words_[w];
      ++num_words_;
    }
  }

  // Narrows the range to one key. fn(position) is the key of a position in the range.
  template <typename Fn>
  __device__ __forceinline__ void narrow(uint32_t cut, const Fn& key_of) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t rest = words_[w].within;
#pragma unroll 1
      for (; rest != 0; rest &= rest - 1) {
        const int i = __ffs(rest) - 1;
        const uint32_t key = key_of(first_ + w * 32 + i);
        if (key > cut) words_[w].above |= 1u << i;
        if (key != cut) words_[w].within &= ~(1u << i);
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

  __device__ __forceinline__ KeyCounts count() const {
    KeyCounts counts{};
#pragma unroll
    for (const KeyBits& word : words_) {
      counts.above += __popc(word.above), counts.ties += __popc(word.within);
    }
    return counts;
  }

  // Calls fn(position) for those in the range.
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
      KeyBits word = words_[0];
#pragma unroll
      for (int other = 1; other < kWords; ++other) word = w == other ? words_[other] : word;
      fn(first_ + w * 32, word);
    }
  }

 private:
  static constexpr int kMostPieces = 15;

  int first_;
  int num_words_;
  KeyBits words_[kWords];  // bit i of word w: position first_ + 32 w + i
};

// The counts of the threads before this one, and in `total` those of the whole block. A thread
// counts less than 2048 keys. A barrier must lie between two calls.
__device__ __forceinline__ KeyCounts scan_counts(const KeyCounts& mine, KeyCounts& total) {
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

// Writes the selected positions of a tile, in order, by a whole block: all whose key lies above the
// cut, and of the ties all but the first, from entry `first_entry` of the row on. Advances the cut
// past the tile. A barrier must lie between two calls.
__device__ __forceinline__ void write_selected(const ComparedKeys& keys, OutputCut& cut,
                                               int first_entry, const IndexRow& row) {
  KeyCounts total;
  const KeyCounts before = scan_counts(keys.count(), total);
  uint32_t num_ties = cut.ties_before + before.ties;
  int entry = first_entry + cut.above_before + before.above +
              (num_ties > cut.ties_to_skip ? num_ties - cut.ties_to_skip : 0);
  keys.for_each_word([&](int first, KeyBits word) {
#pragma unroll 1
    for (; word.within != 0 && num_ties < cut.ties_to_skip; ++num_ties) {
      word.within &= word.within - 1;
    }
#pragma unroll 1
    for (uint32_t rest = word.above | word.within; rest != 0; rest &= rest - 1) {
      row.write(entry++, first + __ffs(rest) - 1);
    }
  });
  cut.above_before += total.above;
  cut.ties_before += total.ties;
}

}  // namespace hata
