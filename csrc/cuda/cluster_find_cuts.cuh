#pragma once

#include "cuda/cluster_cut.cuh"
#include "cuda/cluster_shared.cuh"
#include "selection.h"

// Finding the cuts of all query tokens of a cluster.
namespace hata {

// Positions beside those that always are selected.
__device__ __forceinline__ int num_competing(const ScoreSelectParams& p) {
  return p.top_k - p.num_sink - p.num_recent;
}

// A sequence whose tokens all are selected has nothing to compare.
__device__ __forceinline__ bool must_choose(const ScoreSelectParams& p, int visible) {
  return visible > p.top_k && num_competing(p) > 0;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Whether group sums are exchanged in a phase of find_cuts(). Beside telling the sums they order
// what follows: a block that has all of them knows that all others have scanned, and have read what
// was sent to them before. Without them the second phase of a single token needs a place and a
// barrier of its own for bins.
__device__ __forceinline__ bool exchanges_sums(const ScoreSelectParams& p, int groups, int phase) {
  return phase == 0 || p.q_len > 1 || groups > 1;
}

// By a whole block, once it has scanned its slice and all others have begun: a warp for each query
// token finds in which bin of shared.histogram its cut lies, in phase 1 within the bin that phase 0
// has found. Before it there were `repeats` exchanges more than one a phase. Barriers must come
// before and after. kBounded: bins below shared.bounds are not counted.
template <bool kBounded = false>
__device__ __forceinline__ void find_cuts(const ClusterParams& params, ClusterShared& shared,
                                          int phase, int repeats = 0) {
  const ScoreSelectParams& p = params.select;
  const ClusterSlice& slice = shared.slice;
  const int num_bins = params.bins.counts[phase];
  const int groups = num_bins / kGroupBins;
  const bool has_sums = exchanges_sums(p, groups, phase);
  const int j = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (has_sums) {
    if (threadIdx.x == 0) {
      shared.sums_arrived.expect(slice.place.num_blocks * p.q_len * (groups + kBounded) * 4);
    }
    if (kBounded && j < p.q_len && lane < slice.place.num_blocks) {
      send(shared_address(&shared.bounds.sent[j][slice.place.rank], lane), shared.bounds.mine[j],
           shared_address(&shared.sums_arrived, lane));
    }
    send_group_sums(slice.place, shared.histogram, p.q_len * num_bins, shared.groups, kMaxGroups,
                    shared.sums_arrived);
  }
  if (j >= p.q_len || !must_choose(p, visible_len(slice.seq_len, p.q_len, j))) return;
  const Cut coarse = phase == 0 ? Cut{} : shared.cuts[j];
  const uint32_t wanted = num_competing(p) - coarse.above;
  FoundGroup found{};
  uint32_t bound = 0;
  if (has_sums) {
    shared.sums_arrived.wait(phase + repeats);
    if (kBounded) {
      bound = __reduce_max_sync(kFullMask,
                                lane < slice.place.num_blocks ? shared.bounds.sent[j][lane] : 0);
    }
    found = find_group(slice.place, shared.groups + j * groups, kMaxGroups, groups, wanted);
  }
  const int slot = has_sums ? j : 1;
  Cut cut = find_bin(slice.place, shared.histogram + j * num_bins, found, wanted, shared.bins[slot],
                     shared.bins_arrived[slot], has_sums ? phase + repeats : 0);
  if (kBounded) cut.is_counted = cut.above + cut.ties >= wanted && cut.bin >= bound;
  cut.above += coarse.above;
  cut.above_before += coarse.above_before;
  cut.bin |= coarse.bin << params.bins.shift;
  __syncwarp();  // all lanes have read the coarse cut
  if (lane == 0) shared.cuts[j] = cut;
}

#endif

}  // namespace hata
