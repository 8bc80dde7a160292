#pragma once

#include <cooperative_groups.h>

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

// Finding the last selected key from histograms that lie in the shared memory of a cluster's
// blocks.
namespace hata {

constexpr int kGroupBins = kWarpSize;  // bins of a group, whose sum is kept beside the histogram

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

// value_of(b) is block b's count.
template <typename ValueOf>
__device__ __forceinline__ ClusterCount sum_of_blocks(int rank, int num_blocks,
                                                      const ValueOf& value_of) {
  uint32_t values[kMaxCluster];
#pragma unroll
  for (int block = 0; block < kMaxCluster; ++block) {
    values[block] = block < num_blocks ? value_of(block) : 0;
  }
  ClusterCount sum;
#pragma unroll
  for (int block = 0; block < kMaxCluster; ++block) {
    sum.total += values[block];
    sum.before += block < rank ? values[block] : 0;
  }
  return sum;
}

// Adds up the groups of a histogram of `num_bins` bins, by a whole block, and tells every block of
// the cluster: groups[rank * pitch + g] of each of them. A cluster barrier must follow.
__device__ inline void share_group_sums(const cooperative_groups::cluster_group& cluster,
                                        const uint32_t* histogram, int num_bins, uint32_t* groups,
                                        int pitch) {
  const int lane = threadIdx.x % kWarpSize, rank = cluster.block_rank();
#pragma unroll 1
  for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x) {
    const uint32_t sum = __reduce_add_sync(kFullMask, histogram[bin]);
    if (lane < cluster.num_blocks()) {
      cluster.map_shared_rank(groups, lane)[rank * pitch + bin / kGroupBins] = sum;
    }
  }
}

// The lane with the `wanted`-th of the things that the lanes count, those of lane 0 first, and what
// the lanes before it count.
struct FoundLane {
  int lane;
  ClusterCount above;
};

__device__ __forceinline__ FoundLane find_lane(const ClusterCount& mine, uint32_t wanted) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t inclusive = mine.total;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  const int source = __ffs(__ballot_sync(kFullMask, inclusive >= wanted)) - 1;
  return {source,
          {__shfl_sync(kFullMask, inclusive - mine.total, source),
           __reduce_add_sync(kFullMask, lane < source ? mine.before : 0)}};
}

// By one warp of each block, after the cluster barrier that follows share_group_sums(). `histogram`
// points at the same place in each block's shared memory; groups[b * pitch + g] is what block b
// told of its group g. At least `wanted` >= 1 keys are counted. Not inlined: it is called twice.
__device__ __noinline__ inline Cut find_cut(const cooperative_groups::cluster_group& cluster,
                                            uint32_t* histogram, const uint32_t* groups, int pitch,
                                            int num_groups, uint32_t wanted) {
  const int lane = threadIdx.x % kWarpSize;
  const int rank = cluster.block_rank(), num_blocks = cluster.num_blocks();
  const auto sum_of_group = [&](int group) {
    return sum_of_blocks(rank, num_blocks, [&](int b) { return groups[b * pitch + group]; });
  };
  // Lane 0 has the highest groups.
  const int per_lane = (num_groups + kWarpSize - 1) / kWarpSize;
  ClusterCount mine;
#pragma unroll 1
  for (int i = 0; i < per_lane; ++i) {
    const int group = num_groups - 1 - lane * per_lane - i;
    if (group >= 0) mine += sum_of_group(group);
  }
  const FoundLane of_groups = find_lane(mine, wanted);
  ClusterCount above = of_groups.above;
  int group = num_groups - 1 - of_groups.lane * per_lane;
#pragma unroll 1
  for (int i = 1; i < per_lane; ++i) {
    const ClusterCount sum = sum_of_group(group);
    if (wanted <= above.total + sum.total) break;
    above += sum;
    --group;
  }
  const int first_bin = group * kGroupBins + kGroupBins - 1;  // lane 0's
  const ClusterCount ties = sum_of_blocks(rank, num_blocks, [&](int b) {
    return cluster.map_shared_rank(histogram, b)[first_bin - lane];
  });
  const FoundLane of_bins = find_lane(ties, wanted - above.total);
  above += of_bins.above;
  return {static_cast<uint32_t>(first_bin - of_bins.lane), above.total,
          __shfl_sync(kFullMask, ties.total, of_bins.lane), above.before,
          __shfl_sync(kFullMask, ties.before, of_bins.lane)};
}

#endif

}  // namespace hata
