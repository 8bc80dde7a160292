#pragma once

#include "cuda/decode_step/encode.cuh"
#include "cuda/decode_step/scan.cuh"
#include "cuda/decode_step/select.cuh"

// What a block does where the ranks of its slice do not fit into shared memory (several query
// tokens, very long slices): it scores a sample, guesses from it a bound that the last selected
// rank does not lie below, and keeps those alone that reach the bound: candidates. Each thread
// keeps those of its own positions, so that threads need no order while they scan. A bound that
// turns out to have been too high is dropped, and all is scanned again, so that the result does not
// depend on the guess.
namespace hata::step {

constexpr int kListHeader =
    2;  // words of a list before its entries: where it ends, how many spilled
constexpr int kListGroup = 4;  // entries that may be added after one make_room()

// A word of shared memory by its address there: in a loop that stores a pointer, the compiler would
// take it for one to any memory.
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

// The candidates that one thread has of one query token. An entry is what is kept of a rank, and
// above it which of the thread's positions has it: its place. kTokens places follow one another in
// the sequence, and the lanes of a warp share a run of 32 kTokens positions; a warp scores
// kPositions at a time.
//
// Entries lie in shared memory, those of a block's threads alternating, so that no two lanes meet
// in a bank: from Store::list(j) on there are [entries, threads] words, the first kListHeader of
// which say where each list ends and how many of its entries were spilled: what does not fit goes
// to Store::spilled(j), which has room for every position. A list that ends behind
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

  // Spills what leaves too little room for a group of entries. Between load() and store().
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
  // Adds what is kept of the rank of the i-th position from a place on.
  __device__ __forceinline__ void add(uint32_t kept, uint32_t place, int i) {
    SharedWord{end_}.store(kept + place + (i << 16));
    end_ += pitch();
  }

  // Returns the place, as it is in an entry, of the thread's first position in a warp's chunk that
  // begins there in the slice.
  __device__ static uint32_t place_of(uint32_t chunk_offset) {
    return chunk_offset / kWarpSize << 16;
  }

  // Calls fn(what is kept of the rank, offset in the slice) for every entry.
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

  // Calls fn for entries 0, 1, ... as long as they exist, a group at a time: their loads are under
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
  // array whose lines of 32 belong to the warps' chunks, one position a lane.
  __device__ __forceinline__ uint32_t& spilled(int i) const {
    constexpr int kPerChunk = kPositions / kWarpSize;
    const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
    const int line = (i / kPerChunk * num_warps + warp) * kPerChunk + i % kPerChunk;
    return store_.spilled(token_idx_)[line * kWarpSize + threadIdx.x % kWarpSize];
  }

  const Store& store_;
  const int token_idx_;
  const uint32_t header_;  // addresses in shared memory
  uint32_t end_;
};

// The positions of a tile whose rank lies above the cut, and those that tie with it, in shared
// memory: bit i of word w stands for position tile + 32 w + i. A thread looks at per_thread words.
struct TileBits {
  uint32_t* above;
  uint32_t* ties;
  int per_thread;

  // Returns the words of a thread for a slice of so many positions.
  __host__ __device__ static constexpr int words_for(int positions, int threads) {
    const int words = (positions + threads * kWordBits - 1) / (threads * kWordBits);
    return words < ComparedRanks::kWords ? words : ComparedRanks::kWords;
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
  // Moves the bits to registers and leaves zeros, after a barrier, by all threads.
  __device__ __forceinline__ void move_to(ComparedRanks& ranks, int tile) const {
    const int first = static_cast<int>(threadIdx.x) * per_thread;
    ranks.take(above + first, ties + first, tile + first * kWordBits, per_thread);
  }
};

// Keeps candidates: the ranks from the block's bound on.
template <int kNumWords, bool kNorms, KernelKind kKind>
struct Candidates {
  using Chunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords, kNorms, kKind)>;
  using List = CandidateList<Candidates, CodeUnit<kNumWords>::kTokens, Chunk::kPositions>;
  using Kept = KeptRanks<kNorms>;
  static constexpr bool kHasNorms = kNorms;

  const Params& params;
  const SharedPlan& shared;
  uint32_t* scratch;  // shared memory: what is saved of ScanTables, TileBits, then lists

  // What a CandidateList asks its store for: addresses in shared memory, and the workspace.
  __device__ uint32_t list(int token_idx) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(scratch)) +
           (kTableWords + 2 * params.num_bit_words) * 4 + token_idx * params.list_bytes;
  }
  __device__ uint32_t list_full() const { return params.list_full; }
  __device__ uint32_t* spilled(int token_idx) const {
    const ScoreSelectParams& p = params.select;
    const Slice& slice = shared.slice;
    const int64_t list_idx = slice.first_list + token_idx * p.num_kv_heads;
    return static_cast<uint32_t*>(p.ranks) + list_idx * candidate_pitch(p.table.capacity) +
           slice.begin + slice.place.block * Chunk::kPositions;
  }

  struct Run {
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
  __device__ __forceinline__ Run run(const SharedPlan& shared, int token_idx, int,
                                     int chunk_offset) const {
    Run run{List(*this, token_idx), shared.cut_inbox.bounds.mine[token_idx] << params.bins.shift,
            List::place_of(chunk_offset)};
    run.list.load();
    return run;
  }
};

// Finds candidates again for the selection.
template <typename Candidates>
struct CandidateSource {
  using List = typename Candidates::List;
  using Kept = typename Candidates::Kept;
  static constexpr bool kHasNorms = Candidates::kHasNorms;
  Candidates candidates;
  TileBits bits;

  // Empties the lists, before each scan.
  __device__ __forceinline__ void clear(int q_len) const {
    for (int j = 0; j < q_len; ++j) List(candidates, j).clear();
    bits.clear();
  }

  // Counts the candidates in the histograms of all tokens, after a scan.
  __device__ __forceinline__ void count(const Bins& bins, uint32_t* histogram, int q_len) const {
#pragma unroll 1
    for (int j = 0; j < q_len; ++j) {
      List(candidates, j).for_each([&](uint16_t kept, int) {
        atomicAdd(histogram + j * bins.counts[0] + (Kept::rank(kept) >> bins.shift), 1u);
      });
    }
  }

  template <typename Fn>
  __device__ __forceinline__ void for_each_within(int token_idx, const CompetingSlice&,
                                                  const RankRange& range, ComparedRanks&,
                                                  const Fn& fn) const {
    List(candidates, token_idx).for_each([&](uint16_t kept, int) {
      const uint32_t rank = Kept::rank(kept);
      if (rank >= range.least && rank <= range.most) fn(rank);
    });
  }

  __device__ __forceinline__ int tile_positions() const { return bits.positions(); }

  __device__ __forceinline__ void compare(int token_idx, const CompetingSlice& slice, int tile,
                                          uint32_t cut, bool, ComparedRanks& compared) const {
    List(candidates, token_idx).for_each([&](uint16_t kept, int offset) {
      const uint32_t rank = Kept::rank(kept);
      const int bit = slice.begin + offset - tile;
      if (rank >= cut && bit >= 0 && bit < bits.positions()) bits.mark(bit, rank == cut);
    });
    __syncthreads();
    bits.move_to(compared, tile);
  }
};

// Returns the chunks of a warp when its block scores a sample: one chunk, as far from the next
// warp's as the slice allows.
__device__ __forceinline__ WarpChunks chunk_of_sample(const Slice& slice, int positions) {
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int num_chunks = ceil_div(slice.end - slice.begin, positions);
  const int first = slice.begin + warp * num_chunks / num_warps * positions;
  return {first, min(first + 1, slice.end)};
}

// Finds the bin of the `wanted`-th largest rank that a histogram counts, by one warp; 0 if it
// counts fewer.
__device__ __forceinline__ uint32_t find_bound(const uint32_t* histogram, int num_bins,
                                               uint32_t wanted) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t above = 0;
#pragma unroll 1
  for (int first = num_bins - kGroupBins; first >= 0; first -= kGroupBins) {
    const uint32_t inclusive =
        above + warp_inclusive_scan(histogram[first + kGroupBins - 1 - lane]);
    const unsigned reached = __ballot_sync(kFullMask, inclusive >= wanted);
    if (reached != 0) return first + kGroupBins - __ffs(reached);
    above = __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
  }
  return 0;
}

// Sets the bounds, and clears the counts of the sample from which they are guessed, by a whole
// block, between barriers, once every block has begun. A bound is low enough in each of two cases,
// and the higher one is taken: if more ranks of the slice reach it than are selected in all; and if
// it is the lowest of those that the blocks guess as if slices were alike, since above the cut some
// slice has its share or less.
__device__ __forceinline__ void guess_bounds(const Params& params, SharedPlan& shared,
                                             int num_sampled) {
  const ScoreSelectParams& p = params.select;
  const Slice& slice = shared.slice;
  const int num_bins = params.bins.counts[0], num_blocks = slice.place.num_blocks;
  const int j = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  // A quarter more ranks of the sample than can be expected reach the bound, and twice their
  // standard deviation.
  const auto guess = [&](int num_positions) {
    const float expected = static_cast<float>(num_competing(p, slice.seq_len)) /
                           static_cast<float>(max(num_positions, 1)) *
                           static_cast<float>(num_sampled);
    const float wanted = 1.25f * expected + 2.0f * sqrtf(expected) + 1.0f;
    return find_bound(shared.histogram + j * num_bins, num_bins, static_cast<uint32_t>(wanted));
  };
  if (threadIdx.x == 0) shared.guesses_arrived.expect(num_blocks * p.q_len * 4);
  if (j < p.q_len) {
    const uint32_t alike = guess(slice.seq_len);
    if (lane < num_blocks) {
      send(shared_address(&shared.cut_inbox.bounds.guesses[j][slice.place.block], lane), alike,
           shared_address(&shared.guesses_arrived, lane));
    }
    const uint32_t alone = guess(slice.end - slice.begin);
    shared.guesses_arrived.wait(0);
    const uint32_t lowest = __reduce_min_sync(
        kFullMask, lane < num_blocks ? shared.cut_inbox.bounds.guesses[j][lane] : ~0u);
    if (lane == 0) shared.cut_inbox.bounds.mine[j] = max(alone, lowest);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.q_len * num_bins; i += blockDim.x) shared.histogram[i] = 0;
}

// Whether the bounds of all blocks of the cluster were low enough.
__device__ __forceinline__ bool bounds_were_low(const ScoreSelectParams& p,
                                                const SharedPlan& shared) {
  for (int j = 0; j < p.q_len; ++j) {
    const bool chooses = must_choose(p, visible_len(shared.slice.seq_len, p.q_len, j));
    if (chooses && !shared.cuts[j].is_counted) return false;
  }
  return true;
}

// Scans for candidates and finds the cuts, by a whole block, once the planes are there. A sample
// comes first; should the bounds that it led to be too high, which only a slice unlike its sample
// can bring about, everything is kept. Returns how often it was scanned in vain. A barrier must
// follow.
template <int kNumWords, bool kNorms, KernelKind kKind>
__device__ __forceinline__ int scan_for_candidates(
    const Params& params, SharedPlan& shared,
    const CandidateSource<Candidates<kNumWords, kNorms, kKind>>& source) {
  constexpr int kPositions = Candidates<kNumWords, kNorms, kKind>::Chunk::kPositions;
  constexpr bool kTokens = kKind == KernelKind::kTokens;
  const ScoreSelectParams& p = params.select;
  const auto tables = reinterpret_cast<uint32_t*>(&shared.scan.tables);
  uint32_t* const saved = source.candidates.scratch;
  for (int i = threadIdx.x; i < kTableWords; i += blockDim.x) saved[i] = tables[i];
  if (threadIdx.x < kMaxTokens) shared.cut_inbox.bounds.mine[threadIdx.x] = 0;
#pragma unroll 1
  for (int round = -1;; ++round) {
    source.clear(p.q_len);
    __syncthreads();
    scan<kNumWords, kNorms, kTokens>(params, shared, shared.slice, source.candidates,
                                     round < 0 ? chunk_of_sample(shared.slice, kPositions)
                                               : chunks_of_slice(shared.slice, kPositions));
    source.count(params.bins, shared.histogram, p.q_len);
    __syncthreads();
    if (round < 0) {
      wait_at_cluster_barrier();  // every block has begun
      guess_bounds(params, shared, static_cast<int>(blockDim.x) / kWarpSize * kPositions);
      continue;
    }
    find_cuts<true>(params, shared, 0, round);
    __syncthreads();
    if (bounds_were_low(p, shared)) return round;
    const int num_bins = p.q_len * params.bins.counts[0];
    for (int i = threadIdx.x; i < num_bins; i += blockDim.x) shared.histogram[i] = 0;
    for (int i = threadIdx.x; i < kTableWords; i += blockDim.x) tables[i] = saved[i];
    if (kTokens && scores_at_once<kNumWords>(p.q_len, p.weight_sum)) {
      __syncthreads();
      set_token_weights<kNumWords>(params, shared);
    }
    if (threadIdx.x < kMaxTokens) shared.cut_inbox.bounds.mine[threadIdx.x] = 0;
  }
}

}  // namespace hata::step
