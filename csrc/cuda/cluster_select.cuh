#pragma once

#include "cuda/cluster_cut.cuh"
#include "cuda/cluster_output.cuh"
#include "cuda/cluster_scan.cuh"

// From the histogram and the keys of a slice to the positions that are selected, in a cluster.
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
// has found. Barriers must come before and after.
__device__ __forceinline__ void find_cuts(const ClusterParams& params, ClusterShared& shared,
                                          int phase) {
  const ScoreSelectParams& p = params.select;
  const ClusterSlice& slice = shared.slice;
  const int num_bins = params.bins.counts[phase];
  const int groups = num_bins / kGroupBins;
  const bool has_sums = exchanges_sums(p, groups, phase);
  if (has_sums) {
    if (threadIdx.x == 0) {
      shared.sums_arrived.expect(slice.place.num_blocks * p.q_len * groups * 4);
    }
    send_group_sums(slice.place, shared.histogram, p.q_len * num_bins, shared.groups, kMaxGroups,
                    shared.sums_arrived);
  }
  const int j = threadIdx.x / kWarpSize;
  if (j >= p.q_len || !must_choose(p, visible_len(slice.seq_len, p.q_len, j))) return;
  const Cut coarse = phase == 0 ? Cut{} : shared.cuts[j];
  const uint32_t wanted = num_competing(p) - coarse.above;
  FoundGroup found{};
  if (has_sums) {
    shared.sums_arrived.wait(phase);
    found = find_group(slice.place, shared.groups + j * groups, kMaxGroups, groups, wanted);
  }
  const int slot = has_sums ? j : 1;
  Cut cut = find_bin(slice.place, shared.histogram + j * num_bins, found, wanted, shared.bins[slot],
                     shared.bins_arrived[slot], has_sums ? phase : 0);
  cut.above += coarse.above;
  cut.above_before += coarse.above_before;
  cut.bin |= coarse.bin << params.bins.shift;
  __syncwarp();  // all lanes have read the coarse cut
  if (threadIdx.x % kWarpSize == 0) shared.cuts[j] = cut;
}

// By a whole block, after find_cuts() and a barrier: writes its part of the indices of every query
// token, and of the last one also the first num_kept entries to `kept`. `keys` are those of the
// slice. Returns which entries the last query token's are.
__device__ __forceinline__ IndexRange select_from_keys(const ClusterParams& params,
                                                       ClusterShared& shared, const uint16_t* keys,
                                                       int32_t* kept, int num_kept) {
  const ScoreSelectParams& p = params.select;
  const ClusterSlice& slice = shared.slice;
  const int shift = params.bins.shift, fine_bins = params.bins.counts[1];
  const bool small_keys = params.num_keys <= kSmallKeys;
  const auto visible = [&](int j) { return visible_len(slice.seq_len, p.q_len, j); };
  const auto key_slice = [&](int j) -> KeySlice {
    return {keys + j * slice.key_pitch, slice.begin, slice.end, p.num_sink,
            visible(j) - p.num_recent,  small_keys};
  };
  // The candidates of one token and one tile serve both histograms.
  const bool keeps_candidates =
      p.q_len == 1 && slice.end - slice.begin <= Candidates::tile_positions();
  Candidates candidates;
  if (shift > 0 && must_choose(p, slice.seq_len)) {
    for (int i = threadIdx.x; i < p.q_len * fine_bins; i += blockDim.x) shared.histogram[i] = 0;
    __syncthreads();
    for (int j = 0; j < p.q_len; ++j) {
      if (!must_choose(p, visible(j))) continue;
      const uint32_t bin = shared.cuts[j].bin;
      for (int tile = slice.begin; tile < slice.end; tile += Candidates::tile_positions()) {
        candidates.mark(key_slice(j), tile, slice.pieces, bin << shift);
        candidates.for_each(key_slice(j), [&](int, uint32_t key) {
          if (key >> shift == bin) {
            atomicAdd(&shared.histogram[j * fine_bins + key % (1u << shift)], 1u);
          }
        });
      }
    }
    __syncthreads();
    find_cuts(params, shared, 1);
    __syncthreads();
  }

  IndexRange range{};
#pragma unroll 1
  for (int j = 0; j < p.q_len; ++j) {
    const int64_t token_row = slice.first_row + j * p.num_kv_heads;
    const int num_selected = min(p.top_k, visible(j));
    IndexRow row{p.indices + token_row * p.top_k, kept, num_kept, 0};
    if (slice.place.rank == 0) {
      if (threadIdx.x == 0) p.num_selected[token_row] = num_selected;
      for (int i = num_selected + threadIdx.x; i < p.top_k; i += blockDim.x) row.all[i] = -1;
    }
    const bool all_selected = visible(j) <= p.top_k;
    // If not, the sinks and the recent ones do not overlap.
    const int first_recent = all_selected ? 0 : visible(j) - p.num_recent;
    const int num_sink = all_selected ? 0 : p.num_sink;
    const bool competes = !all_selected && num_competing(p) > 0;
    const Cut cut = competes ? shared.cuts[j] : Cut{};
    OutputCut output{cut.bin, cut.above_before, cut.ties_before,
                     competes ? cut.ties - (num_competing(p) - cut.above) : 0};
    const auto selected_before = [&](int position) {
      return min(position, num_sink) + output.selected_before() +
             min(max(position - first_recent, 0), visible(j) - first_recent);
    };
    row.first = range.first = selected_before(slice.begin);
#pragma unroll 1
    for (int t = slice.begin + threadIdx.x; t < min(slice.end, num_sink); t += blockDim.x) {
      row.write(t, t);
    }
#pragma unroll 1
    for (int t = max(slice.begin, first_recent) + threadIdx.x; t < min(slice.end, visible(j));
         t += blockDim.x) {
      row.write(num_selected - visible(j) + t, t);
    }
#pragma unroll 1
    for (int tile = slice.begin; competes && tile < slice.end;
         tile += Candidates::tile_positions()) {
      if (shift == 0 || !keeps_candidates) {
        candidates.mark(key_slice(j), tile, slice.pieces, cut.bin);
      }
      write_selected(candidates, key_slice(j), output, num_sink, row);
    }
    range.end = selected_before(slice.end);
  }
  return range;
}

#endif

}  // namespace hata
