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

// The candidates that one thread has of one query token. An entry is a key, and below it which of
// the thread's positions has it: its place. kTokens places follow one another in the sequence, and
// the lanes of a warp share a run of 32 kTokens positions; a warp scores kPositions at a time.
//
// Entries lie in shared memory, those of a block's threads alternating, so that no two lanes meet
// in a bank: Store::words() from Store::list(j) on is [kListHeader + Store::capacity(), threads],
// where the first rows say where each list ends and how many of its entries were spilled: what does
// not fit goes to Store::spilled(j), which has room for every position, if Store::spills().
template <typename Store, int kTokens, int kPositions>
class CandidateList {
 public:
  __device__ CandidateList(const Store& store, int token_idx)
      : store_(store),
        token_idx_(token_idx),
        first_(store.list(token_idx) + static_cast<int>(threadIdx.x)) {}

  __device__ __forceinline__ void clear() const {
    word(0) = first_ + kListHeader * pitch();
    word(1) = 0;
  }

  __device__ __forceinline__ void load() { end_ = word(0); }
  __device__ __forceinline__ void store() const { word(0) = end_; }

  // Between load() and store().
  __device__ __forceinline__ void make_room() {
    const int full = first_ + (kListHeader + store_.capacity() - kListGroup) * pitch();
    if (__builtin_expect(end_ <= full, true)) return;
    const int last = end_;
    end_ = first_ + kListHeader * pitch();
    if (!store_.spills()) return;
    int num_spilled = word(1);
#pragma unroll 1
    for (int entry = end_; entry != last; entry += pitch()) {
      spilled(num_spilled++) = store_.words()[entry];
    }
    word(1) = num_spilled;
  }
  __device__ __forceinline__ void add(uint32_t key, int place) {
    store_.words()[end_] = key << 16 | static_cast<uint32_t>(place);
    end_ += pitch();
  }

  // Calls fn(key, offset in the slice) for every entry.
  template <typename Fn>
  __device__ __forceinline__ void for_each(const Fn& fn) {
    load();
#pragma unroll 1
    for (int entry = first_ + kListHeader * pitch(); entry != end_; entry += pitch()) {
      call(fn, store_.words()[entry]);
    }
    const int num_spilled = word(1);
#pragma unroll 1
    for (int i = 0; i < num_spilled; ++i) call(fn, spilled(i));
  }

 private:
  // Words from one entry to the next.
  __device__ static int pitch() { return blockDim.x; }

  __device__ __forceinline__ uint32_t& word(int row) const {
    return store_.words()[first_ + row * pitch()];
  }

  template <typename Fn>
  __device__ __forceinline__ static void call(const Fn& fn, uint32_t entry) {
    const int place = entry % kMostPlaces;
    fn(entry / kMostPlaces, place / kTokens * kTokens * kWarpSize +
                                static_cast<int>(threadIdx.x) % kWarpSize * kTokens +
                                place % kTokens);
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
  const int first_;
  int end_;
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
