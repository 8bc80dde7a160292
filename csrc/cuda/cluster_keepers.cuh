#pragma once

#include "cuda/cluster_candidates.cuh"
#include "cuda/cluster_keys.cuh"
#include "cuda/cluster_shared.cuh"

// What a block keeps of the keys that it scores.
namespace hata {

// What a kernel of score_select by clusters is for: one query token, the keys of a full cache fit
// into shared memory; one query token, any cache; several query tokens.
enum class ClusterUse { kAllFit, kOneToken, kTokens };

// Units that a thread scores at a time: at most 64 bytes and eight positions, and less where
// registers are short.
constexpr int units_per_thread(int num_words, bool norms, ClusterUse use) {
  const bool is_short =
      norms || use == ClusterUse::kOneToken || (use == ClusterUse::kTokens && num_words > 1);
  const int units = num_words == 2 ? 4 : num_words <= 4 ? 2 : 1;
  return is_short && num_words <= 2 ? units / 2 : units;
}

// What a scan keeps of the keys is up to a keeper: AllKeys or Candidates. Of each query token it
// has a row for a thread's next positions, which is shown every pair of keys, says which of them it
// takes, and is given those of them that compete: to be counted in the histogram now, or in a list
// from which they are counted later.

// All keys, in rows of `pitch`.
template <int kNumWords, bool kNorms, ClusterUse kUse>
struct AllKeys {
  using Chunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords, kNorms, kUse)>;

  uint16_t* keys;  // [q_len, pitch] in shared memory, from the beginning of the slice on
  int pitch;

  struct Row {
    uint16_t* keys;

    // `exist`: the positions do; keys of those that do not compete may be anything.
    __device__ __forceinline__ void keep(int, int offset, uint32_t pair, bool exist) const {
      if (exist) *reinterpret_cast<uint32_t*>(keys + offset) = pair;
    }
    __device__ __forceinline__ Pair<bool> takes(const KeptPair&) const { return {true, true}; }
    __device__ __forceinline__ void add(uint32_t* bin, uint32_t, int) const { atomicAdd(bin, 1u); }
    __device__ __forceinline__ void finish() const {}
  };

  // `offset` is where in the slice the thread's first position is.
  __device__ __forceinline__ Row row(const ClusterShared&, int token_idx, int offset, int) const {
    return {keys + token_idx * pitch + offset};
  }
};

constexpr int kTableWords = sizeof(ScanTables) / sizeof(uint32_t);

// Candidates.
template <int kNumWords, bool kNorms, ClusterUse kUse>
struct Candidates {
  using Chunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords, kNorms, kUse)>;
  using List = CandidateList<Candidates, CodeUnit<kNumWords>::kTokens, Chunk::kPositions>;
  using Kept = KeptKeys<kNorms>;

  const ClusterParams& params;
  const ClusterShared& shared;
  uint32_t* scratch;  // shared memory: what is saved of ScanTables, TileBits, then lists

  // Addresses in shared memory.
  __device__ uint32_t list(int token_idx) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(scratch)) +
           (kTableWords + 2 * params.num_bit_words) * 4 + token_idx * params.list_bytes;
  }
  __device__ uint32_t list_full() const { return params.list_full; }
  __device__ uint32_t* spilled(int token_idx) const {
    const ScoreSelectParams& p = params.select;
    const ClusterSlice& slice = shared.slice;
    const int64_t row = slice.first_row + token_idx * p.num_kv_heads;
    return static_cast<uint32_t*>(p.keys) + row * candidate_row_pitch(p.table.capacity) +
           slice.begin + slice.place.rank * Chunk::kPositions;
  }

  struct Row {
    List list;
    KeptBound<kNorms> bound;
    uint32_t place;  // of the thread's first position

    __device__ __forceinline__ void keep(int i, int, uint32_t, bool) {
      if (i % kListGroup == 0) list.make_room();
    }
    __device__ __forceinline__ Pair<bool> takes(const KeptPair& kept) const {
      return bound.lets_pass(kept);
    }
    __device__ __forceinline__ void add(uint32_t*, uint32_t kept, int i) {
      list.add(kept, place, i);
    }
    __device__ __forceinline__ void finish() const { list.store(); }
  };

  // `chunk_offset` is where in the slice the warp's chunk begins.
  __device__ __forceinline__ Row row(const ClusterShared& shared, int token_idx, int,
                                     int chunk_offset) const {
    Row row{List(*this, token_idx), shared.bounds.mine[token_idx] << params.bins.shift,
            List::place_of(chunk_offset)};
    row.list.load();
    return row;
  }
};

}  // namespace hata
