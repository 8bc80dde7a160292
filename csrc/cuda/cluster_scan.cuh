#pragma once

#include "cuda/cluster_candidates.cuh"
#include "cuda/cluster_keys.cuh"
#include "cuda/cluster_shared.cuh"

// How one block of a cluster scores its slice of a sequence: 16-bit keys and a histogram of them.
// Where not all keys fit, it keeps and counts those from a bound on (cluster_candidates.cuh).
namespace hata {

// Units that a thread scores at a time: at most 64 bytes and eight positions, and less where
// registers are short.
constexpr int units_per_thread(int num_words, bool is_short) {
  const int units = num_words == 2 ? 4 : num_words <= 4 ? 2 : 1;
  return is_short && num_words <= 2 ? units / 2 : units;
}

// What a scan keeps of the keys is up to a keeper: AllKeys or Candidates. Of each query token it
// has a row for a thread's next positions, which is shown every pair of keys, says which keys it
// takes, and is given those of them that compete.

// All keys, in rows of `pitch`. kAlone: the kernel cannot do anything else.
template <int kNumWords, bool kNorms, bool kAlone>
struct AllKeys {
  using Chunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords, kNorms || !kAlone)>;

  uint16_t* keys;  // [q_len, pitch] in shared memory, from the beginning of the slice on
  int pitch;

  struct Row {
    uint16_t* keys;

    // `exist`: the positions do; keys of those that do not compete may be anything.
    __device__ __forceinline__ void keep(int, int offset, uint32_t kept, bool exist) const {
      if (exist) *reinterpret_cast<uint32_t*>(keys + offset) = kept;
    }
    __device__ __forceinline__ bool takes(uint32_t) const { return true; }
    __device__ __forceinline__ void add(uint32_t, int) const {}
    __device__ __forceinline__ void finish() const {}
  };

  // `offset` is where in the slice the thread's first position is.
  __device__ __forceinline__ Row row(const ClusterShared&, int token_idx, int offset, int) const {
    return {keys + token_idx * pitch + offset};
  }
};

constexpr int kTableWords = sizeof(ScanTables) / sizeof(uint32_t);

// Candidates.
template <int kNumWords, bool kNorms>
struct Candidates {
  using Chunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords, true)>;
  using List = CandidateList<Candidates, CodeUnit<kNumWords>::kTokens, Chunk::kPositions>;

  const ClusterParams& params;
  const ClusterShared& shared;
  uint32_t* scratch;  // shared memory: what is saved of ScanTables, TileBits, then lists

  __device__ uint32_t* words() const { return scratch; }
  __device__ int capacity() const { return params.list_capacity; }
  __device__ int list(int token_idx) const {
    return kTableWords + 2 * params.num_bit_words +
           token_idx * (kListHeader + params.list_capacity) * static_cast<int>(blockDim.x);
  }
  __device__ bool spills() const { return !shared.bounds.are_guessed; }
  __device__ uint32_t* spilled(int token_idx) const {
    const ScoreSelectParams& p = params.select;
    const ClusterSlice& slice = shared.slice;
    const int64_t row = slice.first_row + token_idx * p.num_kv_heads;
    return static_cast<uint32_t*>(p.keys) + row * candidate_row_pitch(p.table.capacity) +
           slice.begin + slice.place.rank * Chunk::kPositions;
  }

  struct Row {
    List list;
    uint32_t bound;
    int place;  // of the thread's first position

    __device__ __forceinline__ void keep(int i, int, uint32_t, bool) {
      if (i % kListGroup == 0) list.make_room();
    }
    __device__ __forceinline__ bool takes(uint32_t key) const { return key >= bound; }
    __device__ __forceinline__ void add(uint32_t key, int i) { list.add(key, place + i); }
    __device__ __forceinline__ void finish() const { list.store(); }
  };

  // `chunk_offset` is where in the slice the warp's chunk begins.
  __device__ __forceinline__ Row row(const ClusterShared& shared, int token_idx, int,
                                     int chunk_offset) const {
    Row row{List(*this, token_idx), shared.bounds.mine[token_idx] << params.bins.shift,
            chunk_offset / kWarpSize};
    row.list.load();
    return row;
  }
};

// Scores one chunk for every query token: keeps keys, and counts those that compete (neither sink
// nor recent) in the histogram. All positions of a chunk that is no edge compete, for every token.
template <bool kEdge, typename Keeper, int kNumWords, bool kNorms, int kUnits>
__device__ __forceinline__ void score_chunk(const ClusterParams& params, ClusterShared& shared,
                                            const ClusterSlice& slice, const Keeper& keeper,
                                            int num_planes,
                                            const CodeChunk<kNumWords, kNorms, kUnits>& chunk,
                                            int first_position) {
  using Unit = CodeUnit<kNumWords>;
  using Kept = KeptKeys<kNorms>;
  const ScoreSelectParams& p = params.select;
  const int plane_pitch = padded_planes(num_planes) * kNumWords;
  int offsets[kUnits * Unit::kTokens];
  offset_matches(chunk.units, num_planes, p.weight_sum, offsets);
#pragma unroll 1
  for (int j = 0; j < p.q_len; ++j) {
    int matches[kUnits * Unit::kTokens];
    count_matches(
        chunk.units, offsets,
        {plane_rows<kNumWords>(shared.scan.planes + j * plane_pitch, shared.scan.no_planes),
         shared.scan.weights, num_planes, shared.scan.bases[j]},
        matches);
    const int position = chunk.position_of(first_position, 0);
    auto row = keeper.row(shared, j, position - slice.begin, first_position - slice.begin);
    uint32_t* histogram = shared.histogram + j * params.bins.counts[0];
    const int last = min(visible_len(slice.seq_len, p.q_len, j) - p.num_recent, slice.end);
#pragma unroll
    for (int i = 0; i < kUnits * Unit::kTokens; i += 2) {
      const int offset = i / Unit::kTokens * kWarpSize * Unit::kTokens + i % Unit::kTokens;
      uint32_t kept = matches[i] | matches[i + 1] << 16;
      if constexpr (kNorms) {
        constexpr int kNumBits = kNumWords * kWordBits;
        const uint32_t norms = chunk.norms[i / 2];
        const auto minus_score = [&](int n) { return p.weight_sum * kNumBits - 2 * n; };
        kept = Kept::pair(scaled_score<kNumBits>(minus_score(matches[i]), norms & 0xffffu),
                          scaled_score<kNumBits>(minus_score(matches[i + 1]), norms >> 16));
      }
      row.keep(i, offset, kept, !kEdge || position + offset < last);  // positions here are even
      const uint32_t pair = Kept::swap(kept);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int mine = position + offset + t;
        const uint32_t key = t == 0 ? pair & 0xffffu : pair >> 16;
        if (row.takes(key) && (!kEdge || (mine >= p.num_sink && mine < last))) {
          row.add(key, i + t);
          atomicAdd(histogram + (key >> params.bins.shift), 1u);
        }
      }
    }
    row.finish();
  }
}

// Where a warp scores: chunks from `first` on, `step` apart, before `end`.
struct WarpChunks {
  int first, end, step;
};

// The chunks of a warp when a block scores its whole slice.
__device__ __forceinline__ WarpChunks chunks_of_slice(const ClusterSlice& slice, int positions) {
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  return {slice.begin + warp * positions, slice.end, num_warps * positions};
}

// When it scores a sample: one chunk, as far from the next warp's as the slice allows.
__device__ __forceinline__ WarpChunks chunk_of_sample(const ClusterSlice& slice, int positions) {
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int num_chunks = ceil_div(slice.end - slice.begin, positions);
  const int first = slice.begin + warp * num_chunks / num_warps * positions;
  return {first, min(first + 1, slice.end), positions};
}

// What a warp reads next is on its way to L2 while it scores: that keeps more bytes in flight than
// its registers could.
template <int kNumWords, bool kNorms, typename Keeper>
__device__ __forceinline__ void scan(const ClusterParams& params, ClusterShared& shared,
                                     const ClusterSlice& slice, const Keeper& keeper,
                                     const WarpChunks& chunks) {
  using Chunk = typename Keeper::Chunk;
  const ScoreSelectParams& p = params.select;
  const CodeReader<kNumWords> reader(p.table, p.code_cache, slice.batch_idx, slice.kv_head_idx,
                                     slice.only_page);
  const int num_planes = shared.scan.num_planes;
  // Of positions that the first query token sees, the last that compete.
  const int last = visible_len(slice.seq_len, p.q_len, 0) - p.num_recent;
  for (int first = chunks.first; first < chunks.end; first += chunks.step) {
    const int stop = first + Chunk::kPositions;
    if (reader.has_whole_units() && stop <= p.table.capacity) {
      Chunk chunk;
      reader.load_whole(chunk, first);
      reader.template prefetch<kNorms, Chunk::kPositions>(first + chunks.step, slice.end);
      if (first >= p.num_sink && stop <= min(last, slice.end)) {
        score_chunk<false>(params, shared, slice, keeper, num_planes, chunk, first);
      } else {
        score_chunk<true>(params, shared, slice, keeper, num_planes, chunk, first);
      }
    } else {
      using Part = CodeChunk<kNumWords, kNorms, 1>;
#pragma unroll 1
      for (int part = first; part < min(stop, slice.end); part += Part::kPositions) {
        Part chunk;
        reader.load_part(chunk, part, slice.end);
        score_chunk<true>(params, shared, slice, keeper, num_planes, chunk, part);
      }
    }
  }
}

}  // namespace hata
