#pragma once

#include "cuda/block_scan.cuh"
#include "cuda/cluster_exchange.cuh"
#include "cuda/launch.cuh"

// Finding the last selected key from the histograms of a cluster's blocks. Each block tells the
// others the sums of groups of its bins, from which all of them find the group with the cut, and
// then the bins of that group.
namespace hata {

constexpr int kGroupBins = kWarpSize;

// The bin that holds the `wanted`-th largest key of the cluster, and what the ordered output needs:
// how many keys of the cluster lie in higher bins and in this one, and how many of each belong to
// the blocks before this one.
struct Cut {
  uint32_t bin;
  uint32_t above, ties;
  uint32_t above_before, ties_before;
  bool is_counted = true;  // no block has left out keys from its bin on
};

// Where in the cluster a block is.
struct ClusterPlace {
  int rank, num_blocks;
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

// received[b * pitch] is block b's count.
__device__ __forceinline__ ClusterCount sum_of_blocks(const ClusterPlace& place,
                                                      const uint32_t* received, int pitch) {
  uint32_t counts[kMaxCluster];
#pragma unroll
  for (int block = 0; block < kMaxCluster; ++block) {
    counts[block] = block < place.num_blocks ? received[block * pitch] : 0;
  }
  ClusterCount sum;
#pragma unroll
  for (int block = 0; block < kMaxCluster; ++block) {
    sum.total += counts[block];
    sum.before += block < place.rank ? counts[block] : 0;
  }
  return sum;
}

// Adds up the groups of a histogram of `num_bins` bins, by a whole block, and sends them to
// groups[rank * pitch + g] of every block of the cluster.
__device__ __forceinline__ void send_group_sums(const ClusterPlace& place,
                                                const uint32_t* histogram, int num_bins,
                                                uint32_t* groups, int pitch,
                                                const ArrivalBarrier& arrived) {
  const int lane = threadIdx.x % kWarpSize;
  const bool sends = lane < place.num_blocks;
  const uint32_t to = shared_address(groups + place.rank * pitch, sends ? lane : 0);
  const uint32_t barrier = shared_address(&arrived, sends ? lane : 0);
#pragma unroll 1
  for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x) {
    const uint32_t sum = __reduce_add_sync(kFullMask, histogram[bin]);
    if (sends) send(to + bin / kGroupBins * 4, sum, barrier);
  }
}

// The lane with the `wanted`-th of the things that the lanes count, those of lane 0 first, or the
// last lane if there are fewer, and what the lanes before it count.
struct FoundLane {
  int lane;
  ClusterCount above;
};

__device__ __forceinline__ FoundLane find_lane(const ClusterCount& mine, uint32_t wanted) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t inclusive = warp_inclusive_scan(mine.total);
  const unsigned reached = __ballot_sync(kFullMask, inclusive >= wanted);
  const int source = reached == 0 ? kWarpSize - 1 : __ffs(reached) - 1;
  return {source,
          {__shfl_sync(kFullMask, inclusive - mine.total, source),
           __reduce_add_sync(kFullMask, lane < source ? mine.before : 0)}};
}

// Which group of bins holds the cut, and what the groups above it count.
struct FoundGroup {
  int group;
  ClusterCount above;
};

// By one warp of each block, once all group sums have arrived. groups[b * pitch + g] is group g of
// block b. If fewer than `wanted` keys are counted, it is some group.
__device__ __forceinline__ FoundGroup find_group(const ClusterPlace& place, const uint32_t* groups,
                                                 int pitch, int num_groups, uint32_t wanted) {
  const int lane = threadIdx.x % kWarpSize;
  // Lane 0 has the highest groups.
  const int per_lane = (num_groups + kWarpSize - 1) / kWarpSize;
  ClusterCount mine;
#pragma unroll 1
  for (int i = 0; i < per_lane; ++i) {
    const int group = num_groups - 1 - lane * per_lane - i;
    if (group >= 0) mine += sum_of_blocks(place, groups + group, pitch);
  }
  const FoundLane of_groups = find_lane(mine, wanted);
  ClusterCount above = of_groups.above;
  int group = max(num_groups - 1 - of_groups.lane * per_lane, 0);
#pragma unroll 1
  for (int i = 1; i < per_lane && group > 0; ++i) {
    const ClusterCount sum = sum_of_blocks(place, groups + group, pitch);
    if (wanted <= above.total + sum.total) break;
    above += sum;
    --group;
  }
  return {group, above};
}

// By one warp of each block: tells the others its bins of the group, which lie in `histogram`,
// aligned to 16 bytes, and finds the bin with the cut. bins [kMaxCluster, kGroupBins] is where they
// are sent.
__device__ __forceinline__ Cut find_bin(const ClusterPlace& place, const uint32_t* histogram,
                                        const FoundGroup& found, uint32_t wanted, uint32_t* bins,
                                        ArrivalBarrier& bins_arrived, int phase) {
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) bins_arrived.expect(place.num_blocks * kGroupBins * 4);
  // Eight lanes send a block four bins each.
  constexpr int kLanes = kGroupBins / 4;
  const int four = lane % kLanes * 4;
  const auto counts = *reinterpret_cast<const uint4*>(histogram + found.group * kGroupBins + four);
#pragma unroll 1
  for (int block = lane / kLanes; block < place.num_blocks; block += kWarpSize / kLanes) {
    send(shared_address(bins + place.rank * kGroupBins + four, block), counts,
         shared_address(&bins_arrived, block));
  }
  bins_arrived.wait(phase);
  const int first_bin = found.group * kGroupBins + kGroupBins - 1;  // lane 0's
  const ClusterCount ties = sum_of_blocks(place, bins + kGroupBins - 1 - lane, kGroupBins);
  const FoundLane of_bins = find_lane(ties, wanted - found.above.total);
  ClusterCount above = found.above;
  above += of_bins.above;
  return {static_cast<uint32_t>(first_bin - of_bins.lane), above.total,
          __shfl_sync(kFullMask, ties.total, of_bins.lane), above.before,
          __shfl_sync(kFullMask, ties.before, of_bins.lane)};
}

// By one warp: the bin of the `wanted`-th largest key that a histogram counts; 0 if it counts
// fewer.
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

#endif

}  // namespace hata
