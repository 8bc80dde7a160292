#pragma once

#include <cooperative_groups.h>

#include "cuda/mma.cuh"

// Finding the last selected key from histograms that lie in the shared memory of a cluster's
// blocks.
namespace hata {

constexpr int kGroupBins = kWarpSize;  // bins of a group, whose sum is kept beside the histogram
constexpr int kMaxGroupsPerLane = 4;

// The bin that holds the `wanted`-th largest key of the cluster, and what the ordered output needs:
// how many keys of the cluster lie in higher bins and in this one, and how many of each belong to
// the blocks before this one.
struct Cut {
  uint32_t bin;
  uint32_t above, ties;
  uint32_t above_before, ties_before;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// What counts at one place in the histograms add up to.
struct ClusterCount {
  uint32_t total = 0;   // of the whole cluster
  uint32_t before = 0;  // of the blocks before this one

  __device__ ClusterCount& operator+=(const ClusterCount& other) {
    total += other.total, before += other.before;
    return *this;
  }
};

__device__ __forceinline__ ClusterCount
sum_over_cluster(const cooperative_groups::cluster_group& cluster, uint32_t* counts, int i) {
  constexpr int kMaxBlocks = 8;
  const int rank = cluster.block_rank(), num_blocks = cluster.num_blocks();
  uint32_t values[kMaxBlocks];
#pragma unroll
  for (int block = 0; block < kMaxBlocks; ++block) {
    values[block] = block < num_blocks ? cluster.map_shared_rank(counts, block)[i] : 0;
  }
  ClusterCount sum;
#pragma unroll
  for (int block = 0; block < kMaxBlocks; ++block) {
    sum.total += values[block];
    sum.before += block < rank ? values[block] : 0;
  }
  return sum;
}

// The sum over the lanes before this one.
__device__ __forceinline__ ClusterCount exclusive_scan(const ClusterCount& mine) {
  const int lane = threadIdx.x % kWarpSize;
  ClusterCount sum = mine;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const ClusterCount other = {__shfl_up_sync(kFullMask, sum.total, offset),
                                __shfl_up_sync(kFullMask, sum.before, offset)};
    if (lane >= offset) sum += other;
  }
  return {sum.total - mine.total, sum.before - mine.before};
}

// By one warp of each block, after a cluster barrier that follows the last count. `histogram` and
// `groups` point at the same place in each block's shared memory; groups[g] is the sum of bins
// g * kGroupBins and on, and is not read where there is one group. At least `wanted` >= 1 keys are
// counted. Not inlined: it is called twice.
__device__ __noinline__ inline Cut find_cut(const cooperative_groups::cluster_group& cluster,
                                            uint32_t* histogram, uint32_t* groups, int num_groups,
                                            uint32_t wanted) {
  const int lane = threadIdx.x % kWarpSize;
  int group = 0, source;
  ClusterCount above;
  if (num_groups > 1) {
    // Lane 0 has the highest groups. All loads are in flight at once.
    const int per_lane = (num_groups + kWarpSize - 1) / kWarpSize;
    const int highest = num_groups - 1 - lane * per_lane;
    ClusterCount counts[kMaxGroupsPerLane], mine;
#pragma unroll
    for (int i = 0; i < kMaxGroupsPerLane; ++i) {
      if (i < per_lane && highest - i >= 0) {
        counts[i] = sum_over_cluster(cluster, groups, highest - i);
      }
      mine += counts[i];
    }
    above = exclusive_scan(mine);
    const bool here = above.total < wanted && wanted <= above.total + mine.total;
    group = highest;
#pragma unroll
    for (int i = 0; i < kMaxGroupsPerLane - 1; ++i) {
      if (group == highest - i && wanted > above.total + counts[i].total) {
        above += counts[i];
        --group;
      }
    }
    source = __ffs(__ballot_sync(kFullMask, here)) - 1;
    group = __shfl_sync(kFullMask, group, source);
    above = {__shfl_sync(kFullMask, above.total, source),
             __shfl_sync(kFullMask, above.before, source)};
  }
  const int bin = group * kGroupBins + kGroupBins - 1 - lane;
  const ClusterCount ties = sum_over_cluster(cluster, histogram, bin);
  above += exclusive_scan(ties);
  source =
      __ffs(__ballot_sync(kFullMask, above.total < wanted && wanted <= above.total + ties.total)) -
      1;
  return {static_cast<uint32_t>(__shfl_sync(kFullMask, bin, source)),
          __shfl_sync(kFullMask, above.total, source), __shfl_sync(kFullMask, ties.total, source),
          __shfl_sync(kFullMask, above.before, source),
          __shfl_sync(kFullMask, ties.before, source)};
}

#endif

}  // namespace hata
