#pragma once

#include "cuda/attention/merge.cuh"
#include "cuda/decode_step/cut.cuh"
#include "cuda/decode_step/plan.cuh"

// Where clusters would leave most of a GPU idle, because there are few (sequence, KV head) pairs,
// the blocks of the whole grid share them: many to a pair. They are too many for a cluster, so that
// what its blocks send each other goes through the workspace here. All of them are resident at once
// (a cooperative launch), which is why they may wait for each other.
//
// The workspace of one pair; time runs to the right, and | is where blocks wait for each other:
//
//                    encode, scan   | cut       | select               | attend     | merge
//   num_arrived      zero           .           counts ------------------------------------
//   messages[block]
//     group_sums,    counted        | read      .                      .            .
//     histogram      counted        | one group .                      .            .
//     fine_bins      .              .           written | read (norms) .            .
//     max, sum, out  .              .           .                      written      | read
//   (indices)        .              .           written                | read where shares
//                                                                        are evened out
//
// The first wait is for the whole grid, at the barrier that the driver keeps for cooperative
// launches. So nothing is expected of the workspace when the kernel begins, and what another launch
// has left there does no harm; the later waits are for the blocks of the pair alone, and count in
// words that were cleared before the first one.
namespace hata::step {

// What one block tells the others of its pair.
struct BlockMessage {
  uint32_t group_sums[kMaxGroups];  // of the histogram's bins
  uint32_t histogram[kHistogramBins];
  uint32_t fine_bins[kGroupBins];  // the second histogram
  float max[kMaxAttendHeads], sum[kMaxAttendHeads];
  float out[kMaxAttendHeads * kMaxStepHeadDim];
};

// What the blocks of a pair wait for after the cut, each at most once: that all have written their
// fine_bins, their indices, what they found by attending.
enum class Meeting { kFineBins, kIndices, kResults };
constexpr int kNumMeetings = 3;

// The messages of the blocks that share a pair, and this block's place among them.
class PairExchange {
 public:
  __device__ PairExchange(const Params& params, const Slice& slice) : place_(slice.place) {
    const int64_t pair_idx =
        int64_t{slice.batch_idx} * params.select.num_kv_heads + slice.kv_head_idx;
    char* pair = static_cast<char*>(params.select.exchange) +
                 pair_idx * (kHeaderBytes + params.blocks_per_pair * sizeof(BlockMessage));
    num_arrived_ = reinterpret_cast<uint32_t*>(pair);
    messages_ = reinterpret_cast<BlockMessage*>(pair + kHeaderBytes);
  }

  __device__ const Place& place() const { return place_; }
  __device__ BlockMessage& mine() const { return messages_[place_.block]; }
  __device__ const BlockMessage& operator[](int block) const { return messages_[block]; }

  // Clears what wait() waits for, by a whole block, before the grid's barrier.
  __device__ void clear() const {
    if (place_.block == 0 && threadIdx.x < kNumMeetings) num_arrived_[threadIdx.x] = 0;
  }

  // Says that this block has written what it has to, by a whole block.
  __device__ void arrive(Meeting meeting) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter(meeting)) : "memory");
    }
  }
  // Returns once all blocks of the pair have arrived, by a whole block.
  __device__ void wait(Meeting meeting) const {
    if (threadIdx.x == 0) {
      uint32_t arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(counter(meeting))
                     : "memory");
      } while (arrived < static_cast<uint32_t>(place_.num_blocks));
    }
    __syncthreads();
  }

  static constexpr int kHeaderBytes = 128;  // a line, for the counters

 private:
  __device__ uint32_t* counter(Meeting meeting) const {
    return num_arrived_ + static_cast<int>(meeting);
  }

  Place place_;
  uint32_t* num_arrived_;   // [kNumMeetings]
  BlockMessage* messages_;  // [blocks_per_pair]
};
static_assert(PairExchange::kHeaderBytes + sizeof(BlockMessage) <= kExchangeBytesPerBlock);

// Whether more blocks than those of its first cluster share a pair's sequence.
__device__ __forceinline__ bool shares_grid(const Place& place) {
  return place.num_blocks > blocks_of_cluster();
}

// Returns how many of the blocks of a pair share a sequence: a graph that was captured for long
// sequences runs short ones by one cluster for each, as a graph for short ones does.
__device__ __forceinline__ int blocks_that_share(const Params& params, int seq_len) {
  const int cluster_size = blocks_of_cluster();
  if (seq_len < params.grid_from) return cluster_size;
  return min(max(ceil_div(seq_len, kGridSlice), cluster_size + 1), params.blocks_per_pair);
}

// Tells the other blocks this block's histogram, or with `chooses` false nothing, by a whole block
// that has scanned its slice, and returns its arrival at the grid's barrier.
__device__ __forceinline__ GridArrival tell_grid(const Params& params, const SharedPlan& shared,
                                                 bool chooses) {
  const PairExchange exchange(params, shared.slice);
  exchange.clear();
  BlockMessage& mine = exchange.mine();
#pragma unroll 1
  for (int bin = threadIdx.x; chooses && bin < params.bins.counts[0]; bin += blockDim.x) {
    const uint32_t count = shared.histogram[bin];
    mine.histogram[bin] = count;
    const uint32_t sum = __reduce_add_sync(kFullMask, count);
    if (threadIdx.x % kWarpSize == 0) mine.group_sums[bin / kGroupBins] = sum;
  }
  return arrive_at_grid_barrier();
}

// A warp reads the messages of kBlocksOfWarp consecutive blocks, which it asks for at once. Warps
// that are left over do nothing: the time of the others goes into instructions.
constexpr int kBlocksOfWarp = 8;
static_assert(kMaxGridBlocks <= kBlocksOfWarp * many_threads(KernelKind::kGrid) / kWarpSize);
__device__ __forceinline__ bool warp_has_blocks(const Place& place) {
  return static_cast<int>(threadIdx.x) / kWarpSize * kBlocksOfWarp < place.num_blocks;
}
// Calls fn(i, block) for a warp's i-th block, also where there are not as many.
template <typename Fn>
__device__ __forceinline__ void for_blocks_of_warp(const Fn& fn) {
  const int first = static_cast<int>(threadIdx.x) / kWarpSize * kBlocksOfWarp;
#pragma unroll
  for (int i = 0; i < kBlocksOfWarp; ++i) fn(i, first + i);
}

// Adds what a warp's blocks count in one place to `total` and `before`, words of shared memory.
__device__ __forceinline__ void add_counts(const Place& place,
                                           const uint32_t (&counts)[kBlocksOfWarp], uint32_t& total,
                                           uint32_t& before) {
  PairCount sum;
  for_blocks_of_warp(
      [&](int i, int block) { sum += {counts[i], block < place.block ? counts[i] : 0}; });
  if (sum.total != 0) atomicAdd(&total, sum.total);
  if (sum.before != 0) atomicAdd(&before, sum.before);
}

// Finds the cut, and an upper bound of how many of the ranks of a slice are selected, by a whole
// block, once all blocks have told their histograms. A barrier must follow.
__device__ __forceinline__ void find_cut_of_pair(const Params& params, SharedPlan& shared) {
  const PairExchange exchange(params, shared.slice);
  PairInbox& inbox = shared.pair_inbox;
  const Place& place = exchange.place();
  const int lane = threadIdx.x % kWarpSize;
  const int num_groups = params.bins.counts[0] / kGroupBins;
  const uint32_t wanted = num_competing(params.select, shared.slice.seq_len);
  const bool reads = warp_has_blocks(place);
  uint32_t counts[kBlocksOfWarp], higher[kBlocksOfWarp] = {};
#pragma unroll 1
  for (int group = lane; reads && group < num_groups; group += kWarpSize) {
    for_blocks_of_warp([&](int i, int block) {
      counts[i] = block < place.num_blocks ? exchange[block].group_sums[group] : 0;
    });
    add_counts(place, counts, inbox.groups.total[group], inbox.groups.before[group]);
  }
  __syncthreads();
  FoundGroup found{};
  int bin = 0;  // lane 0 has the highest of the group
  if (reads) {
    found = find_group(num_groups, wanted, [&](int group) { return inbox.groups.of(group); });

    bin = found.group * kGroupBins + kGroupBins - 1 - lane;
    for_blocks_of_warp([&](int i, int block) {
      counts[i] = block < place.num_blocks ? exchange[block].histogram[bin] : 0;
    });
#pragma unroll 1
    for (int group = lane; group < num_groups; group += kWarpSize) {
      if (group <= found.group) continue;
      for_blocks_of_warp([&](int i, int block) {
        higher[i] += block < place.num_blocks ? exchange[block].group_sums[group] : 0;
      });
    }
    add_counts(place, counts, inbox.bins[0].total[lane], inbox.bins[0].before[lane]);
  }
  __syncthreads();
  if (!reads) return;
  const Cut cut = cut_in_group(found, inbox.bins[0].of(lane), wanted);
  uint32_t most = 0;
  for_blocks_of_warp([&](int i, int) {
    const uint32_t reached = higher[i] + (bin >= static_cast<int>(cut.bin) ? counts[i] : 0);
    most = max(most, __reduce_add_sync(kFullMask, reached));
  });
  if (lane == 0) atomicMax(&inbox.most_selected, most);
  if (threadIdx.x == 0) shared.cuts[0] = cut;
}

// Finds the cut within the bin that find_cut_of_pair() has found, from the second histogram, by a
// whole block. Barriers must come before and after.
__device__ __forceinline__ void find_fine_cut_of_pair(const Params& params, SharedPlan& shared) {
  const PairExchange exchange(params, shared.slice);
  const Place& place = exchange.place();
  PairSums<kGroupBins>& bins = shared.pair_inbox.bins[1];
  const int lane = threadIdx.x % kWarpSize, bin = kGroupBins - 1 - lane;
  if (threadIdx.x < kWarpSize) exchange.mine().fine_bins[lane] = shared.histogram[lane];
  exchange.arrive(Meeting::kFineBins);
  exchange.wait(Meeting::kFineBins);
  if (warp_has_blocks(place)) {
    uint32_t counts[kBlocksOfWarp];
    for_blocks_of_warp([&](int i, int block) {
      counts[i] = block < place.num_blocks ? exchange[block].fine_bins[bin] : 0;
    });
    add_counts(place, counts, bins.total[lane], bins.before[lane]);
  }
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  const Cut coarse = shared.cuts[0];
  const uint32_t wanted = num_competing(params.select, shared.slice.seq_len) - coarse.above;
  const Cut cut = cut_within(coarse, cut_in_group({}, bins.of(lane), wanted), params.bins.shift);
  __syncwarp();  // all lanes have read the coarse cut
  if (lane == 0) shared.cuts[0] = cut;
}

// Whether so much of the selection may lie in one slice that its block would be the last by far:
// more rows than its warps read in two rounds, and twice its share.
__device__ __forceinline__ bool is_uneven(const Params& params, const SharedPlan& shared) {
  const ScoreSelectParams& p = params.select;
  const Slice& slice = shared.slice;
  const int selected = budget(p, slice.seq_len);
  if (slice.seq_len <= selected) return false;  // all are selected
  const int most = static_cast<int>(shared.pair_inbox.most_selected) +
                   min(slice.length, p.num_sink) + min(slice.length, p.num_recent);
  return most > 2 * static_cast<int>(blockDim.x) / kWarpSize * kTileRows &&
         most > 2 * selected / slice.place.num_blocks;
}

// Returns this block's even share of the selected positions, whole tiles, once all blocks have
// written theirs, by a whole block.
__device__ __forceinline__ IndexRange even_share(const Params& params, const Slice& slice) {
  const PairExchange exchange(params, slice);
  exchange.arrive(Meeting::kIndices);
  exchange.wait(Meeting::kIndices);
  const int num_selected = min(budget(params.select, slice.seq_len), slice.seq_len);
  const int share = ceil_div(ceil_div(num_selected, slice.place.num_blocks), kTileRows) * kTileRows;
  const int first = min(slice.place.block * share, num_selected);
  return {first, min(first + share, num_selected)};
}

// Writes this block's share of the pair's result, by a whole block.
__device__ __forceinline__ void merge_pair(const Params& params, SharedPlan& shared,
                                           const Partials& partials, int64_t first_query,
                                           int group) {
  const int head_dim = partials.head_dim;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const PairExchange exchange(params, shared.slice);
  BlockMessage& mine = exchange.mine();
  for (int i = threadIdx.x; i < group * head_dim; i += blockDim.x) {
    mine.out[i] = partials.out(i / head_dim, i % head_dim);
  }
  if (threadIdx.x < group) {
    const AttentionState state = partials.state(threadIdx.x);
    mine.max[threadIdx.x] = state.max, mine.sum[threadIdx.x] = state.sum;
  }
  exchange.arrive(Meeting::kResults);

  // For 32 channels of a head, one a lane, each warp merges the results of its blocks, and the
  // first warp what all warps have found, in their order.
  const Place& place = exchange.place();
  const int num_pieces = group * head_dim / kWarpSize;
  if (place.block >= num_pieces) return;
  exchange.wait(Meeting::kResults);
  const int num_warps = ceil_div(place.num_blocks, kBlocksOfWarp);
  float* const outs = reinterpret_cast<float*>(shared.results);  // [warps, channels]
  float* const sums = outs + blockDim.x;                         // [warps]
  for (int piece = place.block; piece < num_pieces; piece += place.num_blocks) {
    const int head = piece * kWarpSize / head_dim;
    float max = -INFINITY;
    if (warp < num_warps) {
      float maxima[kBlocksOfWarp], their_sums[kBlocksOfWarp], their_outs[kBlocksOfWarp];
      for_blocks_of_warp([&](int i, int block) {
        const bool exists = block < place.num_blocks;
        maxima[i] = exists ? exchange[block].max[head] : -INFINITY;
        their_sums[i] = exists ? exchange[block].sum[head] : 0.0f;
        their_outs[i] = exists ? exchange[block].out[piece * kWarpSize + lane] : 0.0f;
      });
#pragma unroll
      for (int first = 0; first < kMaxGridBlocks; first += kWarpSize) {
        const int block = first + lane;
        max = fmaxf(max, block < place.num_blocks ? exchange[block].max[head] : -INFINITY);
      }
      max = max_of_lanes<Lanes::kWarp>(max);
      float out = 0.0f, sum = 0.0f;
      for_blocks_of_warp([&](int i, int) {
        const float weight = weight_in_union(maxima[i], max);
        out += weight * their_outs[i], sum += weight * their_sums[i];
      });
      outs[threadIdx.x] = out;
      if (lane == 0) sums[warp] = sum;
    }
    __syncthreads();
    if (warp == 0) {
      float out = 0.0f, sum = 0.0f;
#pragma unroll 4
      for (int w = 0; w < num_warps; ++w) out += outs[w * kWarpSize + lane], sum += sums[w];
      write_result(params.attend, first_query + head, head_dim, piece * kWarpSize % head_dim + lane,
                   {max, sum}, out);
    }
    __syncthreads();
  }
}

}  // namespace hata::step
