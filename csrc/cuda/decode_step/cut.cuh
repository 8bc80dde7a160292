#pragma once

#include "cuda/decode_step/plan.cuh"
#include "cuda/primitives/cluster.cuh"
#include "cuda/primitives/warp.cuh"

// The third phase: the cluster finds the rank of its last selected position from the histograms of
// its blocks. Each block tells the others the sums of groups of its bins, from which all of them
// find the group with the cut, and then the bins of that group.
namespace hata::step {

// Returns the cut in terms of ranks of which the second histogram, of the bin that the first one
// has found, has given the low bits.
__device__ __forceinline__ Cut cut_within(const Cut& coarse, Cut cut, int shift) {
  cut.above += coarse.above;
  cut.above_before += coarse.above_before;
  cut.bin |= coarse.bin << shift;
  return cut;
}

// Adds up the counts that the blocks have sent: received[b * pitch] is block b's.
__device__ __forceinline__ PairCount sum_of_blocks(const Place& place, const uint32_t* received,
                                                   int pitch) {
  uint32_t counts[kMaxCluster];
#pragma unroll
  for (int block = 0; block < kMaxCluster; ++block) {
    counts[block] = block < place.num_blocks ? received[block * pitch] : 0;
  }
  PairCount sum;
#pragma unroll
  for (int block = 0; block < kMaxCluster; ++block) {
    sum.total += counts[block];
    sum.before += block < place.block ? counts[block] : 0;
  }
  return sum;
}

// Adds up the groups of a histogram of `num_bins` bins, by a whole block, and sends them to
// groups[block * pitch + g] of every block of the cluster.
__device__ __forceinline__ void send_group_sums(const Place& place, const uint32_t* histogram,
                                                int num_bins, uint32_t* groups, int pitch,
                                                const ArrivalBarrier& arrived) {
  const int lane = threadIdx.x % kWarpSize;
  const bool sends = lane < place.num_blocks;
  const uint32_t to = shared_address(groups + place.block * pitch, sends ? lane : 0);
  const uint32_t barrier = shared_address(&arrived, sends ? lane : 0);
#pragma unroll 1
  for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x) {
    const uint32_t sum = __reduce_add_sync(kFullMask, histogram[bin]);
    if (sends) send(to + bin / kGroupBins * 4, sum, barrier);
  }
}

// A lane, and what the lanes before it count.
struct FoundLane {
  int lane;
  PairCount above;
};

// Finds the lane with the `wanted`-th of the things that the lanes count, those of lane 0 first, or
// the last lane if there are fewer, by a whole warp.
__device__ __forceinline__ FoundLane find_lane(const PairCount& mine, uint32_t wanted) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t inclusive = warp_inclusive_scan(mine.total);
  const unsigned reached = __ballot_sync(kFullMask, inclusive >= wanted);
  const int source = reached == 0 ? kWarpSize - 1 : __ffs(reached) - 1;
  return {source,
          {__shfl_sync(kFullMask, inclusive - mine.total, source),
           __reduce_add_sync(kFullMask, lane < source ? mine.before : 0)}};
}

// The group of bins that holds the cut, and what the groups above it count.
struct FoundGroup {
  int group;
  PairCount above;
};

// Finds the group of bins with the cut, by a warp. count_of(g) is what group g counts. If fewer
// than `wanted` ranks are counted, it is some group.
template <typename CountOf>
__device__ __forceinline__ FoundGroup find_group(int num_groups, uint32_t wanted,
                                                 const CountOf& count_of) {
  const int lane = threadIdx.x % kWarpSize;
  // Lane 0 has the highest groups.
  const int per_lane = (num_groups + kWarpSize - 1) / kWarpSize;
  PairCount mine;
#pragma unroll 1
  for (int i = 0; i < per_lane; ++i) {
    const int group = num_groups - 1 - lane * per_lane - i;
    if (group >= 0) mine += count_of(group);
  }
  const FoundLane of_groups = find_lane(mine, wanted);
  PairCount above = of_groups.above;
  int group = max(num_groups - 1 - of_groups.lane * per_lane, 0);
#pragma unroll 1
  for (int i = 1; i < per_lane && group > 0; ++i) {
    const PairCount sum = count_of(group);
    if (wanted <= above.total + sum.total) break;
    above += sum;
    --group;
  }
  return {group, above};
}

// Finds the bin with the cut in the group with the cut, by a warp, of which lane 0 counts the
// highest bin, lane 1 the next, and so on.
__device__ __forceinline__ Cut cut_in_group(const FoundGroup& found, const PairCount& mine,
                                            uint32_t wanted) {
  const int first_bin = found.group * kGroupBins + kGroupBins - 1;  // lane 0's
  const FoundLane of_bins = find_lane(mine, wanted - found.above.total);
  PairCount above = found.above;
  above += of_bins.above;
  return {static_cast<uint32_t>(first_bin - of_bins.lane), above.total,
          __shfl_sync(kFullMask, mine.total, of_bins.lane), above.before,
          __shfl_sync(kFullMask, mine.before, of_bins.lane)};
}

// Tells the other blocks this block's bins of the group, which lie in `histogram`, aligned to 16
// bytes, and finds the bin with the cut, by one warp of each block. bins [kMaxCluster, kGroupBins]
// is where the blocks send them.
__device__ __forceinline__ Cut find_bin(const Place& place, const uint32_t* histogram,
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
    send(shared_address(bins + place.block * kGroupBins + four, block), counts,
         shared_address(&bins_arrived, block));
  }
  bins_arrived.wait(phase);
  return cut_in_group(found, sum_of_blocks(place, bins + kGroupBins - 1 - lane, kGroupBins),
                      wanted);
}

// Whether group sums are exchanged in a phase of find_cuts(). Beside telling the sums they order
// what follows: a block that has all of them knows that all others have scanned, and have read what
// was sent to them before. Without them the second phase of a single token needs a place and a
// barrier of its own for bins.
__device__ __forceinline__ bool exchanges_sums(const ScoreSelectParams& p, int groups, int phase) {
  return phase == 0 || p.q_len > 1 || groups > 1;
}

// Finds the cuts of all query tokens, by a whole block that has scanned its slice, once all others
// have begun: a warp for each token finds in which bin of shared.histogram its cut lies, in phase 1
// within the bin that phase 0 has found. Before it there were `repeats` exchanges more than one a
// phase. Barriers must come before and after. With kBounded, bins below the bounds are not counted.
template <bool kBounded = false>
__device__ __forceinline__ void find_cuts(const Params& params, SharedPlan& shared, int phase,
                                          int repeats = 0) {
  const ScoreSelectParams& p = params.select;
  const Slice& slice = shared.slice;
  const int num_bins = params.bins.counts[phase];
  const int groups = num_bins / kGroupBins;
  const bool has_sums = exchanges_sums(p, groups, phase);
  const int j = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (has_sums) {
    if (threadIdx.x == 0) {
      shared.sums_arrived.expect(slice.place.num_blocks * p.q_len * (groups + kBounded) * 4);
    }
    if (kBounded && j < p.q_len && lane < slice.place.num_blocks) {
      send(shared_address(&shared.cut_inbox.bounds.sent[j][slice.place.block], lane),
           shared.cut_inbox.bounds.mine[j], shared_address(&shared.sums_arrived, lane));
    }
    send_group_sums(slice.place, shared.histogram, p.q_len * num_bins, shared.cut_inbox.groups,
                    kMaxGroups, shared.sums_arrived);
  }
  const int visible = visible_len(slice.seq_len, p.q_len, j);
  if (j >= p.q_len || !must_choose(p, visible)) return;
  const Cut coarse = phase == 0 ? Cut{} : shared.cuts[j];
  const uint32_t wanted = num_competing(p, visible) - coarse.above;
  FoundGroup found{};
  uint32_t bound = 0;
  if (has_sums) {
    shared.sums_arrived.wait(phase + repeats);
    if (kBounded) {
      bound = __reduce_max_sync(
          kFullMask, lane < slice.place.num_blocks ? shared.cut_inbox.bounds.sent[j][lane] : 0);
    }
    const uint32_t* sums = shared.cut_inbox.groups + j * groups;  // [kMaxCluster, kMaxGroups]
    found = find_group(groups, wanted, [&](int group) {
      return sum_of_blocks(slice.place, sums + group, kMaxGroups);
    });
  }
  const int slot = has_sums ? j : 1;
  Cut cut = find_bin(slice.place, shared.histogram + j * num_bins, found, wanted, shared.bins[slot],
                     shared.bins_arrived[slot], has_sums ? phase + repeats : 0);
  if (kBounded) cut.is_counted = cut.above + cut.ties >= wanted && cut.bin >= bound;
  cut = cut_within(coarse, cut, params.bins.shift);
  __syncwarp();  // all lanes have read the coarse cut
  if (lane == 0) shared.cuts[j] = cut;
}

}  // namespace hata::step
