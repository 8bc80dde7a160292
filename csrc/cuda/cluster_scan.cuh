#pragma once

#include "cuda/cluster_keepers.cuh"

// How one block of a cluster scores its slice of a sequence: 16-bit keys and a histogram of them.
// Where not all keys fit, it keeps and counts those from a bound on (cluster_candidates.cuh).
namespace hata {

// Of one query token: keeps the keys of a thread's kPositions positions, the first of them
// `position`, and counts those that compete (neither sink nor recent, and before `last`) in the
// histogram. All positions of a chunk that is no edge compete, for every token. kept_pair(i) is
// what is kept of positions i and i + 1.
template <bool kEdge, bool kNorms, int kPositions, int kUnitTokens, typename Row, typename Fn>
__device__ __forceinline__ void keep_scores(const ClusterParams& params, Row row, int position,
                                            int last, uint32_t* histogram, const Fn& kept_pair) {
  const ScoreSelectParams& p = params.select;
#pragma unroll
  for (int i = 0; i < kPositions; i += 2) {
    const int offset = i / kUnitTokens * kWarpSize * kUnitTokens + i % kUnitTokens;
    const KeptPair kept = kept_pair(i);
    row.keep(i, offset, kept.pair, !kEdge || position + offset < last);  // positions here are even
    const Pair<uint32_t> keys = KeptKeys<kNorms>::keys(kept);
    const Pair<bool> takes = row.takes(kept);
    const auto add = [&](int t, bool is_taken, uint32_t key, uint32_t kept_key) {
      const int mine = position + offset + t;
      if (is_taken && (!kEdge || (mine >= p.num_sink && mine < last))) {
        row.add(histogram + (key >> params.bins.shift), kept_key, i + t);
      }
    };
    add(0, takes.first, keys.first, kept.first);
    add(1, takes.second, keys.second, kept.second);
  }
  row.finish();
}

// Scores one chunk for every query token, one after another.
template <bool kEdge, typename Keeper, int kNumWords, bool kNorms, int kUnits>
__device__ __forceinline__ void score_chunk(const ClusterParams& params, ClusterShared& shared,
                                            const ClusterSlice& slice, const Keeper& keeper,
                                            int num_planes,
                                            const CodeChunk<kNumWords, kNorms, kUnits>& chunk,
                                            int first_position) {
  using Unit = CodeUnit<kNumWords>;
  constexpr int kPositions = kUnits * Unit::kTokens, kNumBits = kNumWords * kWordBits;
  const ScoreSelectParams& p = params.select;
  const int plane_pitch = padded_planes(num_planes) * kNumWords;
  int offsets[kPositions];
  offset_matches(chunk.units, num_planes, p.weight_sum, offsets);
#pragma unroll 1
  for (int j = 0; j < p.q_len; ++j) {
    int matches[kPositions];
    count_matches(
        chunk.units, offsets,
        {plane_rows<kNumWords>(shared.scan.planes + j * plane_pitch, shared.scan.no_planes),
         shared.scan.weights, num_planes, shared.scan.bases[j]},
        matches);
    const int position = chunk.position_of(first_position, 0);
    const auto row = keeper.row(shared, j, position - slice.begin, first_position - slice.begin);
    const int last = min(visible_len(slice.seq_len, p.q_len, j) - p.num_recent, slice.end);
    keep_scores<kEdge, kNorms, kPositions, Unit::kTokens>(
        params, row, position, last, shared.histogram + j * params.bins.counts[0], [&](int i) {
          if constexpr (!kNorms) return KeptKeys<false>::pair(matches[i], matches[i + 1]);
          const auto minus_score = [&](int n) {
            return score_per_bit<kNumBits>(
                static_cast<float>(p.weight_sum * kNumBits - 2 * matches[n]));
          };
          return KeptKeys<true>::pair(minus_score(i), minus_score(i + 1), chunk.norms[i / 2]);
        });
  }
}

// TokenWeights, from the planes in shared memory, by a whole block, between barriers.
template <int kNumWords>
__device__ __forceinline__ void set_token_weights(const ClusterParams& params,
                                                  ClusterShared& shared) {
  const ScoreSelectParams& p = params.select;
  shared.token_weights.set(shared.scan.planes, padded_planes(num_planes(p.weight_sum)) * kNumWords,
                           kNumWords, p.q_len, p.weight_sum);
}

// The same as score_chunk() for kTokensAtOnce tokens at a time.
template <bool kEdge, typename Keeper, int kNumWords, bool kNorms, int kUnits>
__device__ __forceinline__ void score_chunk_at_once(
    const ClusterParams& params, ClusterShared& shared, const ClusterSlice& slice,
    const Keeper& keeper, const CodeChunk<kNumWords, kNorms, kUnits>& chunk, int first_position) {
  using Unit = CodeUnit<kNumWords>;
  constexpr int kPositions = kUnits * Unit::kTokens, kNumBits = kNumWords * kWordBits;
  const ScoreSelectParams& p = params.select;
  const TokenColumn column(shared.token_weights);
  const int position = chunk.position_of(first_position, 0);
  const int chunk_offset = first_position - slice.begin, offset = position - slice.begin;
#pragma unroll 1
  for (int first = 0; first < p.q_len; first += kTokensAtOnce) {
    const TokenSums<kPositions> sums = sum_tokens(chunk.units, column, first);
#pragma unroll
    for (int t = 0; t < kTokensAtOnce; ++t) {
      const int j = first + t;
      if (j >= p.q_len) break;
      const int base = shared.scan.bases[j];
      const int last = min(visible_len(slice.seq_len, p.q_len, j) - p.num_recent, slice.end);
      keep_scores<kEdge, kNorms, kPositions, Unit::kTokens>(
          params, keeper.row(shared, j, offset, chunk_offset), position, last,
          shared.histogram + j * params.bins.counts[0], [&](int i) {
            if constexpr (!kNorms) {
              return KeptKeys<false>::pair(base + sums.sum(i, t), base + sums.sum(i + 1, t));
            }
            const auto minus_score = [&](int n) {
              return sums.template minus_score_per_bit<kNumBits>(
                  n, t, static_cast<float>(p.weight_sum * kNumBits - 2 * base));
            };
            return KeptKeys<true>::pair(minus_score(i), minus_score(i + 1), chunk.norms[i / 2]);
          });
    }
  }
}

// Where a warp scores: chunks from `first` on, before `end`, those of the block's warps
// alternating.
struct WarpChunks {
  int first, end;
};

// The chunks of a warp when a block scores its whole slice.
__device__ __forceinline__ WarpChunks chunks_of_slice(const ClusterSlice& slice, int positions) {
  const int warp = threadIdx.x / kWarpSize;
  return {slice.begin + warp * positions, slice.end};
}

// When it scores a sample: one chunk, as far from the next warp's as the slice allows.
__device__ __forceinline__ WarpChunks chunk_of_sample(const ClusterSlice& slice, int positions) {
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int num_chunks = ceil_div(slice.end - slice.begin, positions);
  const int first = slice.begin + warp * num_chunks / num_warps * positions;
  return {first, min(first + 1, slice.end)};
}

// What a warp reads next is on its way to L2 while it scores: that keeps more bytes in flight than
// its registers could.
template <int kNumWords, bool kNorms, bool kTokens, typename Keeper>
__device__ __forceinline__ void scan(const ClusterParams& params, ClusterShared& shared,
                                     const ClusterSlice& slice, const Keeper& keeper,
                                     const WarpChunks& chunks) {
  using Chunk = typename Keeper::Chunk;
  const ScoreSelectParams& p = params.select;
  const CodeReader<kNumWords> reader(p.table, p.code_cache, slice.batch_idx, slice.kv_head_idx,
                                     slice.only_page);
  const int num_planes = shared.scan.num_planes;
  const bool at_once = kTokens && scores_at_once<kNumWords>(p.q_len, p.weight_sum);
  const int step = blockDim.x * (Chunk::kPositions / kWarpSize);
  for (int first = chunks.first; first < chunks.end; first += step) {
    const int stop = first + Chunk::kPositions;
    if (reader.has_whole_units() && stop <= p.table.capacity) {
      Chunk chunk;
      reader.load_whole(chunk, first);
      reader.template prefetch<kNorms, Chunk::kPositions>(first + step, slice.end);
      const bool is_edge = first < p.num_sink || stop > slice.last;
      const auto score = [&]<bool kEdge>() {
        if constexpr (kTokens) {
          if (at_once)
            return score_chunk_at_once<kEdge>(params, shared, slice, keeper, chunk, first);
        }
        score_chunk<kEdge>(params, shared, slice, keeper, num_planes, chunk, first);
      };
      is_edge ? score.template operator()<true>() : score.template operator()<false>();
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
