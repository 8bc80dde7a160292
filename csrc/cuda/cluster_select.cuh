#pragma once

#include "cuda/cluster_find_cuts.cuh"
#include "cuda/cluster_source.cuh"

// From the histogram and the kept keys of a slice to the positions that are selected, in a cluster.
namespace hata {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// By a whole block, after find_cuts() and a barrier: writes its part of the indices of every query
// token, and of the last one also the first num_kept entries to `kept`. Returns which entries the
// last query token's are.
template <typename Source>
__device__ __forceinline__ IndexRange select_from(const ClusterParams& params,
                                                  ClusterShared& shared, const Source& source,
                                                  int repeats, int32_t* kept, int num_kept) {
  const ScoreSelectParams& p = params.select;
  const ClusterSlice& slice = shared.slice;
  const int shift = params.bins.shift, fine_bins = params.bins.counts[1];
  const auto visible = [&](int j) { return visible_len(slice.seq_len, p.q_len, j); };
  const auto key_slice = [&](int j) -> KeySlice {
    return {slice.begin, slice.end, p.num_sink, visible(j) - p.num_recent};
  };
  // The tile of one token serves both histograms.
  const bool one_tile = p.q_len == 1 && slice.end - slice.begin <= source.tile_positions();
  ComparedKeys compared;
  if (shift > 0 && must_choose(p, slice.seq_len)) {
    for (int i = threadIdx.x; i < p.q_len * fine_bins; i += blockDim.x) shared.histogram[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int j = 0; j < p.q_len; ++j) {
      if (!must_choose(p, visible(j))) continue;
      const uint32_t first = shared.cuts[j].bin << shift, low_bits = (1u << shift) - 1;
      source.for_each_within(j, key_slice(j), {first, first | low_bits}, compared,
                             [&](uint32_t key) {
                               atomicAdd(&shared.histogram[j * fine_bins + (key & low_bits)], 1u);
                             });
    }
    __syncthreads();
    find_cuts(params, shared, 1, repeats);
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
    for (int tile = slice.begin; competes && tile < slice.end; tile += source.tile_positions()) {
      source.compare(j, key_slice(j), tile, cut.bin, shift > 0 && one_tile, compared);
      if (!one_tile) __syncthreads();
      write_selected(compared, output, num_sink, row);
    }
    range.end = selected_before(slice.end);
  }
  return range;
}

#endif

}  // namespace hata
