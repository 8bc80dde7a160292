#pragma once

#include "cuda/block_scan.cuh"
#include "cuda/check.h"

namespace hata {

constexpr int kBitmapPositions = 64 * 1024;  // of one tile of a slice

// Bit i of word w: may position 32 w + i of the tile be selected?
struct Candidates {
  uint32_t words[kBitmapPositions / 32];
};

// One block's part of a row of keys. Positions outside first..last do not compete.
struct KeySlice {
  const uint16_t* keys;  // of position `begin` on; a multiple of 8 of them can be read
  int begin, end;
  int first, last;
};

// Bit i of the result: is key i of eight at least `least`?
__device__ __forceinline__ uint32_t compare_keys(const uint4& eight, uint32_t least) {
  const uint32_t pairs[] = {eight.x, eight.y, eight.z, eight.w};
  const uint32_t high = least << 16;  // what is below the upper key of a pair does not matter
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (pairs[i] << 16 >= high) bits |= 1u << 2 * i;
    if (pairs[i] >= high) bits |= 2u << 2 * i;
  }
  return bits;
}

// Marks the competing positions of a tile whose key is at least `least`, by a whole block; each
// thread writes only bytes, so a barrier must follow.
__device__ inline void mark_candidates(Candidates& candidates, const KeySlice& slice, int tile,
                                       uint32_t least) {
  const int stop = min(slice.last, min(tile + kBitmapPositions, slice.end));
  const int num_bytes = ceil_div(min(kBitmapPositions, slice.end - tile), 32) * 4;
  const uint16_t* keys = slice.keys + (tile - slice.begin);
#pragma unroll 4
  for (int byte = threadIdx.x; byte < num_bytes; byte += blockDim.x) {
    const int position = tile + byte * 8;
    uint32_t bits = compare_keys(*reinterpret_cast<const uint4*>(keys + byte * 8), least);
    if (position < slice.first) bits &= 0xffu << min(slice.first - position, 8);
    if (position + 8 > stop) bits &= 0xffu >> min(position + 8 - stop, 8);
    reinterpret_cast<uint8_t*>(candidates.words)[byte] = bits;
  }
}

// Calls fn(position, key) for the candidates of this thread's words of a tile, in order. Thread by
// thread the words are in order too.
template <typename Fn>
__device__ __forceinline__ void for_each_candidate(const Candidates& candidates,
                                                   const KeySlice& slice, int tile, const Fn& fn) {
  const int num_words = ceil_div(min(kBitmapPositions, slice.end - tile), 32);
  const int words_per_thread = ceil_div(num_words, static_cast<int>(blockDim.x));
  const int first_word = threadIdx.x * words_per_thread;
  const int end_word = min(first_word + words_per_thread, num_words);
#pragma unroll 1
  for (int word = first_word; word < end_word; ++word) {
#pragma unroll 1
    for (uint32_t rest = candidates.words[word]; rest != 0; rest &= rest - 1) {
      const int position = tile + word * 32 + __ffs(rest) - 1;
      fn(position, static_cast<uint32_t>(slice.keys[position - slice.begin]));
    }
  }
}

// Where the selection of one slice of a sequence begins and ends.
struct OutputCut {
  uint32_t key;           // the last selected key
  uint32_t above_before;  // keys above it in the slices before this one
  uint32_t ties_before;   // keys equal to it there
  uint32_t ties_to_skip;  // of all the keys equal to it, how many of the first are not selected
};

// Writes the selected positions of a tile, in order, by a whole block: the candidates whose key
// lies above the cut, and of the ties all but the first. Advances the cut past the tile.
__device__ inline void write_selected(const Candidates& candidates, const KeySlice& slice, int tile,
                                      OutputCut& cut, int32_t* indices) {
  uint32_t counts = 0;  // above in the lower half, ties in the upper one
  for_each_candidate(candidates, slice, tile, [&](int, uint32_t key) {
    counts += static_cast<uint32_t>(key > cut.key) + (static_cast<uint32_t>(key == cut.key) << 16);
  });
  uint32_t total;
  const uint32_t before = block_exclusive_scan(counts, total);
  uint32_t num_above = cut.above_before + (before & 0xffffu);
  uint32_t num_ties = cut.ties_before + (before >> 16);
  for_each_candidate(candidates, slice, tile, [&](int position, uint32_t key) {
    if (key < cut.key) return;
    const bool tied = key == cut.key;
    if (!tied || num_ties >= cut.ties_to_skip) {
      const uint32_t ties_selected = num_ties > cut.ties_to_skip ? num_ties - cut.ties_to_skip : 0;
      indices[num_above + ties_selected] = position;
    }
    num_above += !tied;
    num_ties += tied;
  });
  cut.above_before += total & 0xffffu;
  cut.ties_before += total >> 16;
}

}  // namespace hata
