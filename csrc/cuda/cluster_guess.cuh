#pragma once

#include "cuda/cluster_barrier.cuh"
#include "cuda/cluster_find_cuts.cuh"
#include "cuda/cluster_source.cuh"

// Scanning for candidates: a bound is guessed from a sample, and dropped if it was too high.
namespace hata {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Sets the bounds to where the counts of a sample let expect a quarter more keys than the slice
// could contribute, and clears the counts. By a whole block, between barriers.
__device__ __forceinline__ void guess_bounds(const ClusterParams& params, ClusterShared& shared,
                                             int num_sampled) {
  const ScoreSelectParams& p = params.select;
  const int length = max(shared.slice.end - shared.slice.begin, 1);
  const int num_bins = params.bins.counts[0];
  const int j = threadIdx.x / kWarpSize;
  if (j < p.q_len) {
    const float share = static_cast<float>(num_competing(p)) / static_cast<float>(length);
    const auto wanted = static_cast<uint32_t>(1.25f * share * static_cast<float>(num_sampled)) + 1;
    const uint32_t bound = find_bound(shared.histogram + j * num_bins, num_bins, wanted);
    if (threadIdx.x % kWarpSize == 0) shared.bounds.mine[j] = bound;
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
template <int kNumWords, bool kNorms>
__device__ __forceinline__ int scan_for_candidates(
    const ClusterParams& params, ClusterShared& shared,
    const CandidateSource<Candidates<kNumWords, kNorms>>& source) {
  constexpr int kPositions = Candidates<kNumWords, kNorms>::Chunk::kPositions;
  const ScoreSelectParams& p = params.select;
  const auto tables = reinterpret_cast<uint32_t*>(&shared.scan);
  uint32_t* const saved = source.candidates.scratch;
  for (int i = threadIdx.x; i < kTableWords; i += blockDim.x) saved[i] = tables[i];
  if (threadIdx.x < kMaxClusterTokens) shared.bounds.mine[threadIdx.x] = 0;
#pragma unroll 1
  for (int round = -1;; ++round) {
    if (threadIdx.x == 0) shared.bounds.are_guessed = round < 0;
    source.clear(p.q_len);
    __syncthreads();
    scan<kNumWords, kNorms>(params, shared, shared.slice, source.candidates,
                            round < 0 ? chunk_of_sample(shared.slice, kPositions)
                                      : chunks_of_slice(shared.slice, kPositions));
    __syncthreads();
    if (round < 0) {
      guess_bounds(params, shared, static_cast<int>(blockDim.x) / kWarpSize * kPositions);
      continue;
    }
    if (round == 0) wait_at_cluster_barrier();  // every block has begun
    find_cuts<true>(params, shared, 0, round);
    __syncthreads();
    if (bounds_were_low(p, shared)) return round;
    const int num_bins = p.q_len * params.bins.counts[0];
    for (int i = threadIdx.x; i < num_bins; i += blockDim.x) shared.histogram[i] = 0;
    for (int i = threadIdx.x; i < kTableWords; i += blockDim.x) tables[i] = saved[i];
    if (threadIdx.x < kMaxClusterTokens) shared.bounds.mine[threadIdx.x] = 0;
  }
}

#endif

}  // namespace hata
