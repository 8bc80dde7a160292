#pragma once

#include "cuda/cluster_barrier.cuh"
#include "cuda/cluster_find_cuts.cuh"
#include "cuda/cluster_source.cuh"

// Scanning for candidates: a bound is guessed from a sample, and dropped if it was too high.
namespace hata {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Sets the bounds, and clears the counts of the sample from which they are guessed. By a whole
// block, between barriers, once every block has begun. A bound is low enough in each of two cases,
// and the higher one is taken: if more keys of the slice reach it than are selected in all; and if
// it is the lowest of those that the blocks guess as if slices were alike, since above the cut some
// slice has its share or less.
__device__ __forceinline__ void guess_bounds(const ClusterParams& params, ClusterShared& shared,
                                             int num_sampled) {
  const ScoreSelectParams& p = params.select;
  const ClusterSlice& slice = shared.slice;
  const int num_bins = params.bins.counts[0], num_blocks = slice.place.num_blocks;
  const int j = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  // A quarter more than to be expected, and twice the standard deviation.
  const auto guess = [&](int num_positions) {
    const float expected = static_cast<float>(num_competing(p)) /
                           static_cast<float>(max(num_positions, 1)) *
                           static_cast<float>(num_sampled);
    const float wanted = 1.25f * expected + 2.0f * sqrtf(expected) + 1.0f;
    return find_bound(shared.histogram + j * num_bins, num_bins, static_cast<uint32_t>(wanted));
  };
  if (threadIdx.x == 0) shared.guesses_arrived.expect(num_blocks * p.q_len * 4);
  if (j < p.q_len) {
    const uint32_t alike = guess(slice.seq_len);
    if (lane < num_blocks) {
      send(shared_address(&shared.bounds.guesses[j][slice.place.rank], lane), alike,
           shared_address(&shared.guesses_arrived, lane));
    }
    const uint32_t alone = guess(slice.end - slice.begin);
    shared.guesses_arrived.wait(0);
    const uint32_t lowest =
        __reduce_min_sync(kFullMask, lane < num_blocks ? shared.bounds.guesses[j][lane] : ~0u);
    if (lane == 0) shared.bounds.mine[j] = max(alone, lowest);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.q_len * num_bins; i += blockDim.x) shared.histogram[i] = 0;
}

// Whether the bounds of all blocks of the cluster were low enough.
__device__ __forceinline__ bool bounds_were_low(const ScoreSelectParams& p,
                                                const ClusterShared& shared) {
  for (int j = 0; j < p.q_len; ++j) {
    const bool chooses = must_choose(p, visible_len(shared.slice.seq_len, p.q_len, j));
    if (chooses && !shared.cuts[j].is_counted) return false;
  }
  return true;
}

// By a whole block, once the planes are there: scans for candidates and finds the cuts. A sample
// comes first; should the bounds that it led to be too high, which only a slice unlike its sample
// can bring about, everything is kept. Returns how often it was scanned in vain. A barrier must
// follow.
template <int kNumWords, bool kNorms, ClusterUse kUse>
__device__ __forceinline__ int scan_for_candidates(
    const ClusterParams& params, ClusterShared& shared,
    const CandidateSource<Candidates<kNumWords, kNorms, kUse>>& source) {
  constexpr int kPositions = Candidates<kNumWords, kNorms, kUse>::Chunk::kPositions;
  constexpr bool kTokens = kUse == ClusterUse::kTokens;
  const ScoreSelectParams& p = params.select;
  const auto tables = reinterpret_cast<uint32_t*>(&shared.scan);
  uint32_t* const saved = source.candidates.scratch;
  for (int i = threadIdx.x; i < kTableWords; i += blockDim.x) saved[i] = tables[i];
  if (threadIdx.x < kMaxClusterTokens) shared.bounds.mine[threadIdx.x] = 0;
#pragma unroll 1
  for (int round = -1;; ++round) {
    source.clear(p.q_len);
    __syncthreads();
    scan<kNumWords, kNorms, kTokens>(params, shared, shared.slice, source.candidates,
                                     round < 0 ? chunk_of_sample(shared.slice, kPositions)
                                               : chunks_of_slice(shared.slice, kPositions));
    source.count(params.bins, shared.histogram, p.q_len);
    __syncthreads();
    if (round < 0) {
      wait_at_cluster_barrier();  // every block has begun
      guess_bounds(params, shared, static_cast<int>(blockDim.x) / kWarpSize * kPositions);
      continue;
    }
    find_cuts<true>(params, shared, 0, round);
    __syncthreads();
    if (bounds_were_low(p, shared)) return round;
    const int num_bins = p.q_len * params.bins.counts[0];
    for (int i = threadIdx.x; i < num_bins; i += blockDim.x) shared.histogram[i] = 0;
    for (int i = threadIdx.x; i < kTableWords; i += blockDim.x) tables[i] = saved[i];
    if (kTokens && scores_at_once<kNumWords>(p.q_len, p.weight_sum)) {
      __syncthreads();
      set_token_weights<kNumWords>(params, shared);
    }
    if (threadIdx.x < kMaxClusterTokens) shared.bounds.mine[threadIdx.x] = 0;
  }
}

#endif

}  // namespace hata
