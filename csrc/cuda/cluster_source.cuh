#pragma once

#include "cuda/cluster_output.cuh"
#include "cuda/cluster_scan.cuh"

// Where the selection finds the keys again that a scan kept.
namespace hata {

// All of them in shared memory,
template <typename AllKeys, bool kNorms>
struct KeySource {
  AllKeys rows;
  int pieces;  // of a thread (ComparedKeys)

  // Calls fn(key) for every key in the range, and leaves in `compared` what the last tile has.
  template <typename Fn>
  __device__ __forceinline__ void for_each_within(int token_idx, const KeySlice& slice,
                                                  const KeyRange& range, ComparedKeys& compared,
                                                  const Fn& fn) const {
    const uint16_t* keys = rows.keys + token_idx * rows.pitch;
#pragma unroll 1
    for (int tile = slice.begin; tile < slice.end; tile += tile_positions()) {
      compared.template compare<kNorms>(keys, slice, tile, pieces, range);
      compared.for_each_within(
          [&](int position) { fn(KeptKeys<kNorms>::key(keys[position - slice.begin])); });
    }
  }

  __device__ __forceinline__ int tile_positions() const { return ComparedKeys::tile_positions(); }

  // Compares a tile with the cut; from_range: it has been compared with a range that holds the cut.
  __device__ __forceinline__ void compare(int token_idx, const KeySlice& slice, int tile,
                                          uint32_t cut, bool from_range,
                                          ComparedKeys& compared) const {
    const uint16_t* keys = rows.keys + token_idx * rows.pitch;
    if (!from_range)
      return compared.template compare<kNorms>(keys, slice, tile, pieces, {cut, cut});
    compared.narrow(
        cut, [&](int position) { return KeptKeys<kNorms>::key(keys[position - slice.begin]); });
  }
};

// or candidates alone.
template <typename Candidates>
struct CandidateSource {
  using List = typename Candidates::List;
  using Kept = typename Candidates::Kept;
  Candidates candidates;
  TileBits bits;

  // Before each scan.
  __device__ __forceinline__ void clear(int q_len) const {
    for (int j = 0; j < q_len; ++j) List(candidates, j).clear();
    bits.clear();
  }

  // After it, in the histograms of all tokens.
  __device__ __forceinline__ void count(const Bins& bins, uint32_t* histogram, int q_len) const {
#pragma unroll 1
    for (int j = 0; j < q_len; ++j) {
      List(candidates, j).for_each([&](uint16_t kept, int) {
        atomicAdd(histogram + j * bins.counts[0] + (Kept::key(kept) >> bins.shift), 1u);
      });
    }
  }

  template <typename Fn>
  __device__ __forceinline__ void for_each_within(int token_idx, const KeySlice&,
                                                  const KeyRange& range, ComparedKeys&,
                                                  const Fn& fn) const {
    List(candidates, token_idx).for_each([&](uint16_t kept, int) {
      const uint32_t key = Kept::key(kept);
      if (key >= range.least && key <= range.most) fn(key);
    });
  }

  __device__ __forceinline__ int tile_positions() const { return bits.positions(); }

  __device__ __forceinline__ void compare(int token_idx, const KeySlice& slice, int tile,
                                          uint32_t cut, bool, ComparedKeys& compared) const {
    List(candidates, token_idx).for_each([&](uint16_t kept, int offset) {
      const uint32_t key = Kept::key(kept);
      const int bit = slice.begin + offset - tile;
      if (key >= cut && bit >= 0 && bit < bits.positions()) bits.mark(bit, key == cut);
    });
    __syncthreads();
    bits.move_to(compared, tile);
  }
};

}  // namespace hata
