#pragma once

#include "cuda/cluster_append.cuh"
#include "cuda/cluster_attend.cuh"
#include "cuda/cluster_cut.cuh"
#include "cuda/code_scan.cuh"
#include "cuda/score_select_cluster.h"
#include "cuda/token_products.cuh"

// What score_select by clusters is told, and what a block has in shared memory.
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
  Bins bins;
  int key_bytes;              // of shared memory, beginning at kKeyOffset
  int row_end;                // where the rows that are attended over end in shared memory
  int num_bit_words;          // of each half of TileBits
  int list_bytes, list_full;  // of CandidateList, for one query token
  bool attends;               // over what it selected, as `attend` says: one query token
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
  int last;        // those that compete for every query token are before it
  int length;      // of all slices but the last
};

// What the scan reads beside codes.
struct ScanTables {
  PlaneWeights weights;
  int num_planes;
  alignas(8) uint32_t planes[kMaxClusterTokens * kMaxPlanes * kMaxWords];
  alignas(8) uint32_t no_planes[kMaxPlanes * kMaxWords];  // zero
  int bases[kMaxClusterTokens];
  uint32_t largest[kMaxClusterTokens];
};

// Where keys do not fit: bins below these are not counted, of this block, and as the others have
// sent theirs; and what all have guessed from their samples.
struct Bounds {
  uint32_t mine[kMaxClusterTokens];
  uint32_t sent[kMaxClusterTokens][kMaxCluster];
  uint32_t guesses[kMaxClusterTokens][kMaxCluster];
};

struct ClusterShared {
  ClusterSlice slice;
  ArrivalBarrier guesses_arrived;
  ArrivalBarrier sums_arrived;
  ArrivalBarrier bins_arrived[kMaxClusterTokens];
  AttendShared attend;
  // Of what other blocks send, group sums have been read before any block can send a result, and
  // bounds are not needed once the cuts are found.
  union {
    struct {
      uint32_t groups[kMaxCluster * kMaxGroups];
      Bounds bounds;
    };
    alignas(16) char results[kMaxResultBytes];
  };
  // From here on everything is free once the positions are written: the place of rows.
  alignas(16) uint32_t histogram[kHistogramBins];  // [q_len, bins]
  // Nobody sends bins before he knows what this block has scanned.
  union {
    struct {
      ScanTables scan;
      TokenWeights<kMaxClusterTokens, kMaxWords> token_weights;
    };
    uint32_t bins[kMaxClusterTokens][kMaxCluster * kGroupBins];
  };
  Cut cuts[kMaxClusterTokens];
  NewTokens new_tokens;
  NewRows new_rows;
};

}  // namespace hata
