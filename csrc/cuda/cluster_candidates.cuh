#pragma once

#include "cuda/cluster_output.cuh"
#include "cuda/mma.cuh"
#include "hash_code.h"

// Where the keys of a slice do not fit into shared memory (several query tokens, very long slices),
// a block keeps those alone that may be selected: it guesses from a sample a bound that the last
// selected key does not lie below. Each thread keeps the candidates of its own positions, so that
// threads need no order while they scan.
namespace hata {

constexpr int kListHeader = 2;
constexpr int kListGroup = 4;  // entries that may be added after one make_room()
constexpr int kMostPlaces = 1 << 16;

// A word of shared memory. A pointer to it would be one to any memory in a loop that stores it.
struct SharedWord {
  uint32_t address;

  __device__ __forceinline__ uint32_t load() const {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
  }
  __device__ __forceinline__ void store(uint32_t value) const {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value));
  }
};

// The candidates that one thread has of one query token. An entry is what is kept of a key, and
// above it which of the thread's positions has it: its place. kTokens places follow one another in
// the sequence, and the lanes of a warp share a run of 32 kTokens positions; a warp scores
// kPositions at a time.
//
// Entries lie in shared memory, those of a block's threads alternating, so that no two lanes meet
// in a bank: from Store::list(j) on there are [entries, threads] words,
// where the first rows say where each list ends and how many of its entries were spilled: what does
// not fit goes to Store::spilled(j), which has room for every position. A list that ends behind
// Store::list_full() has no room for a group.
template <typename Store, int kTokens, int kPositions>
class CandidateList {
 public:
  __device__ CandidateList(const Store& store, int token_idx)
      : store_(store), token_idx_(token_idx), header_(store.list(token_idx) + threadIdx.x * 4) {}

  __device__ __forceinline__ void clear() {
    end_ = first();
    store();
    num_spilled().store(0);
  }

  __device__ __forceinline__ void load() { end_ = SharedWord{header_}.load(); }
  __device__ __forceinline__ void store() const { SharedWord{header_}.store(end_); }

  // Between load() and store().
  __device__ __forceinline__ void make_room() {
    const uint32_t full = header_ + store_.list_full();
    if (__builtin_expect(end_ <= full, true)) return;
    int count = num_spilled().load();
#pragma unroll 1
    for (; end_ > full; ++count) {
      end_ -= pitch();
      spilled(count) = SharedWord{end_}.load();
    }
    num_spilled().store(count);
  }
  // What is kept of the key of the i-th position from a place on.
  __device__ __forceinline__ void add(uint32_t kept, uint32_t place, int i) {
    SharedWord{end_}.store(kept + place + (i << 16));
    end_ += pitch();
  }

  // The place, as it is in an entry, of the thread's first position in a warp's chunk that begins
  // there in the slice.
  __device__ static uint32_t place_of(uint32_t chunk_offset) {
    return chunk_offset / kWarpSize << 16;
  }

  // Calls fn(what is kept of the key, offset in the slice) for every entry.
  template <typename Fn>
  __device__ __forceinline__ void for_each(const Fn& fn) {
    load();
    const auto address = [&](int i) { return first() + i * pitch(); };
    for_each_of([&](int i) { return address(i) < end_; },
                [&](int i) { return SharedWord{address(i)}.load(); }, fn);
    const int count = num_spilled().load();
    for_each_of([&](int i) { return i < count; }, [&](int i) { return spilled(i); }, fn);
  }

 private:
  // Bytes from one entry to the next.
  __device__ static uint32_t pitch() { return blockDim.x * 4; }

  __device__ __forceinline__ uint32_t first() const { return header_ + kListHeader * pitch(); }
  __device__ __forceinline__ SharedWord num_spilled() const { return {header_ + pitch()}; }

  // Calls it for entries 0, 1, ... as long as they exist, a group at a time: their loads are under
  // way together.
  template <typename Exists, typename Load, typename Fn>
  __device__ __forceinline__ static void for_each_of(const Exists& exists, const Load& load_entry,
                                                     const Fn& fn) {
#pragma unroll 1
    for (int i = 0; exists(i); i += kListGroup) {
      uint32_t entries[kListGroup];
#pragma unroll
      for (int n = 0; n < kListGroup; ++n) entries[n] = exists(i + n) ? load_entry(i + n) : 0;
#pragma unroll
      for (int n = 0; n < kListGroup; ++n) {
        if (!exists(i + n)) break;
        const int place = entries[n] >> 16;
        fn(static_cast<uint16_t>(entries[n]),
           place / kTokens * kTokens * kWarpSize +
               static_cast<int>(threadIdx.x) % kWarpSize * kTokens + place % kTokens);
      }
    }
  }

  // A thread has no more candidates than positions: its i-th goes where its i-th position is in an
  // array whose rows are the warps' chunks, one position a lane.
  __device__ __forceinline__ uint32_t& spilled(int i) const {
    constexpr int kRows = kPositions / kWarpSize;
    const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
    const int row = (i / kRows * num_warps + warp) * kRows + i % kRows;
    return store_.spilled(token_idx_)[row * kWarpSize + threadIdx.x % kWarpSize];
  }

  const Store& store_;
  const int token_idx_;
  const uint32_t header_;  // addresses in shared memory
  uint32_t end_;
};

// Of a tile of positions, those whose key lies above the cut, and those that tie with it, in shared
// memory: bit i of word w stands for position tile + 32 w + i. A thread looks at per_thread words.
struct TileBits {
  uint32_t* above;
  uint32_t* ties;
  int per_thread;

  // Words of a thread for a slice of so many positions.
  __host__ __device__ static constexpr int words_for(int positions, int threads) {
    const int words = (positions + threads * kWordBits - 1) / (threads * kWordBits);
    return words < ComparedKeys::kWords ? words : ComparedKeys::kWords;
  }

  __device__ int num_words() const { return static_cast<int>(blockDim.x) * per_thread; }
  __device__ int positions() const { return num_words() * kWordBits; }

  __device__ __forceinline__ void clear() const {
#pragma unroll 1
    for (int i = threadIdx.x; i < num_words(); i += blockDim.x) above[i] = ties[i] = 0;
  }
  __device__ __forceinline__ void mark(int bit, bool is_tie) const {
    atomicOr((is_tie ? ties : above) + bit / kWordBits, 1u << bit % kWordBits);
  }
  // After a barrier, by all threads.
  __device__ __forceinline__ void move_to(ComparedKeys& keys, int tile) const {
    const int first = static_cast<int>(threadIdx.x) * per_thread;
    keys.take(above + first, ties + first, tile + first * kWordBits, per_thread);
  }
};

}  // namespace hata
