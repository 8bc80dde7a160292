#pragma once

#include "cuda/cluster_append.cuh"
#include "cuda/cluster_attend.cuh"
#include "cuda/cluster_cut.cuh"
#include "cuda/cluster_output.cuh"
#include "cuda/code_scan.cuh"
#include "cuda/score_select_cluster.h"
#include "selection.h"

// How one block of a cluster scores its slice of a sequence: 16-bit keys and a histogram of them.
namespace hata {

constexpr int kHistogramBins = 4096;  // of all query tokens together: 16 KB
constexpr int kMaxGroups = kHistogramBins / kGroupBins;

// How 16-bit keys become bins: key >> shift, and where shift > 0 a second histogram of the low bits
// of the keys in the bin at the cut.
struct Bins {
  int counts[2];  // of the two histograms of one query token, multiples of kGroupBins
  int shift;
};

struct ClusterParams {
  ScoreSelectParams select;
  bool encodes;  // the planes come from `encode`, not from select.planes, and `append` is done
  EncodeQueryParams encode;
  CacheAppendParams append;
  int group;  // query heads of a KV head
  int num_keys;
  Bins bins;
  int key_bytes;  // of shared memory, beginning at kKeyOffset
  int row_end;    // where the rows that are attended over end in shared memory
  bool attends;   // over what it selected, as `attend` says: one query token
  GatherAttentionParams attend;
};

// One block's part of a (sequence, KV head).
struct ClusterSlice {
  ClusterPlace place;
  int64_t first_row;  // of the outputs: query token 0; the next token's is num_kv_heads later
  int batch_idx, kv_head_idx;
  int seq_len;
  int only_page;
  int begin, end;  // positions
  int pieces;      // of a thread (Candidates)
  bool keys_are_shared;
  uint16_t* keys;     // of query token 0, from `begin` on; in shared memory or in the workspace
  int64_t key_pitch;  // from one query token's keys to the next
};

// What the scan reads beside codes.
struct ScanTables {
  PlaneWeights weights;
  alignas(8) uint32_t planes[kMaxClusterTokens * kMaxPlanes * kMaxWords];
  alignas(8) uint32_t no_planes[kMaxPlanes * kMaxWords];  // zero
  int bases[kMaxClusterTokens];
  uint32_t largest[kMaxClusterTokens];
};

struct ClusterShared {
  ClusterSlice slice;
  ArrivalBarrier sums_arrived;
  ArrivalBarrier bins_arrived[kMaxClusterTokens];
  AttendShared attend;
  // Of what other blocks send, group sums have been read before any block can send a result.
  union {
    uint32_t groups[kMaxCluster * kMaxGroups];
    alignas(16) char results[kMaxResultBytes];
  };
  // From here on everything is free once the positions are written: the place of rows.
  alignas(16) uint32_t histogram[kHistogramBins];  // [q_len, bins]
  // Nobody sends bins before he knows what this block has scanned.
  union {
    ScanTables scan;
    uint32_t bins[kMaxClusterTokens][kMaxCluster * kGroupBins];
  };
  Cut cuts[kMaxClusterTokens];
  NewTokens new_tokens;
  NewRows new_rows;
};

// Units that a thread scores at a time: at most 64 bytes and eight positions.
constexpr int units_per_thread(int num_words) {
  return num_words == 2 ? 4 : num_words <= 4 ? 2 : 1;
}

// Scores one chunk for every query token: keys, and counts of those that compete (neither sink nor
// recent) to the histogram. All positions of a chunk that is no edge compete, for every token.
template <bool kEdge, int kNumWords, bool kNorms, int kUnits>
__device__ __forceinline__ void score_chunk(const ClusterParams& params, ClusterShared& shared,
                                            const ClusterSlice& slice, int num_planes,
                                            const CodeChunk<kNumWords, kNorms, kUnits>& chunk,
                                            int first_position) {
  using Unit = CodeUnit<kNumWords>;
  const ScoreSelectParams& p = params.select;
  const int plane_pitch = padded_planes(num_planes) * kNumWords;
  for (int j = 0; j < p.q_len; ++j) {
    int matches[kUnits * Unit::kTokens];
    count_matches(
        chunk.units,
        {plane_rows<kNumWords>(shared.scan.planes + j * plane_pitch, shared.scan.no_planes),
         shared.scan.weights, p.weight_sum, num_planes, shared.scan.bases[j]},
        matches);
    const int position = chunk.position_of(first_position, 0);
    uint16_t* keys = slice.keys + j * slice.key_pitch + (position - slice.begin);
    uint32_t* histogram = shared.histogram + j * params.bins.counts[0];
    const int last = min(visible_len(slice.seq_len, p.q_len, j) - p.num_recent, slice.end);
#pragma unroll
    for (int i = 0; i < kUnits * Unit::kTokens; i += 2) {
      const int offset = i / Unit::kTokens * kWarpSize * Unit::kTokens + i % Unit::kTokens;
      uint32_t pair[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        pair[t] = matches[i + t];
        if constexpr (kNorms) {
          pair[t] = ordered_key_float16(float16_score<kNumWords * kWordBits>(
              matches[i + t], p.weight_sum, static_cast<uint16_t>(chunk.norms[i / 2] >> t * 16)));
        }
      }
      // Keys of positions that do not compete may be anything; positions here are even.
      if (!kEdge || position + offset < last) {
        *reinterpret_cast<uint32_t*>(keys + offset) = pair[0] | pair[1] << 16;
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int mine = position + offset + t;
        if (!kEdge || (mine >= p.num_sink && mine < last)) {
          atomicAdd(histogram + (pair[t] >> params.bins.shift), 1u);
        }
      }
    }
  }
}

// Scores the slice. What a warp reads next is on its way to L2 while it scores: that keeps more
// bytes in flight than its registers could.
template <int kNumWords, bool kNorms>
__device__ void scan_slice(const ClusterParams& params, ClusterShared& shared,
                           const ClusterSlice slice) {
  using Chunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords)>;
  const ScoreSelectParams& p = params.select;
  const CodeReader<kNumWords> reader(p.table, p.code_cache, slice.batch_idx, slice.kv_head_idx,
                                     slice.only_page);
  const int num_planes = hata::num_planes(p.weight_sum);
  // Of positions that the first query token sees, the last that compete.
  const int last = visible_len(slice.seq_len, p.q_len, 0) - p.num_recent;
  const int step = static_cast<int>(blockDim.x) / kWarpSize * Chunk::kPositions;
  for (int first = slice.begin + threadIdx.x / kWarpSize * Chunk::kPositions; first < slice.end;
       first += step) {
    const int stop = first + Chunk::kPositions;
    if (reader.has_whole_units() && stop <= p.table.capacity) {
      Chunk chunk;
      reader.load_whole(chunk, first);
      reader.template prefetch<kNorms, Chunk::kPositions>(first + step, slice.end);
      if (first >= p.num_sink && stop <= min(last, slice.end)) {
        score_chunk<false>(params, shared, slice, num_planes, chunk, first);
      } else {
        score_chunk<true>(params, shared, slice, num_planes, chunk, first);
      }
    } else {
      using Part = CodeChunk<kNumWords, kNorms, 1>;
#pragma unroll 1
      for (int part = first; part < min(stop, slice.end); part += Part::kPositions) {
        Part chunk;
        reader.load_part(chunk, part, slice.end);
        score_chunk<true>(params, shared, slice, num_planes, chunk, part);
      }
    }
  }
}

}  // namespace hata
