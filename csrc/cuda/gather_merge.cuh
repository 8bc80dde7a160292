#pragma once

#include "cuda/cluster_exchange.cuh"
#include "cuda/gather_rows.cuh"
#include "cuda/launch.cuh"

// Merging the softmaxes of gather_attention's warps and of the blocks of a cluster.
namespace hata {

// What a block's warps leave behind for up to `heads` queries: the unnormalized output, the maximum
// and the sum, in base 2.
template <int kHeadDim>
class Partials {
 public:
  static constexpr int bytes(int warps, int heads) {
    return (warps * heads * (kPitch + 2) + 2 * heads) * 4;
  }

  __device__ Partials(void* memory, int warps, int heads)
      : warps_(warps),
        heads_(heads),
        out_(static_cast<float*>(memory)),
        max_(out_ + warps * heads * kPitch),
        sum_(max_ + warps * heads),
        merged_max_(sum_ + warps * heads),
        merged_sum_(merged_max_ + heads) {}

  // By the warps below `warps`.
  template <int kHeadTiles>
  __device__ void store(const Accumulator<kHeadDim, kHeadTiles>& acc) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < kHeadTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = acc.sum[m][i];
#pragma unroll
        for (int mask = 4; mask <= 16; mask *= 2) sum += __shfl_xor_sync(kFullMask, sum, mask);
        const int head = m * kTileHeads + lane % 4 * 2 + i;
        if (head >= heads_) continue;
        const int row = warp * heads_ + head;
        if (lane < 4) {
          max_[row] = acc.max[m][i];
          sum_[row] = sum;
        }
        float* out = out_ + row * kPitch + lane / 4;
#pragma unroll
        for (int n = 0; n < kHeadDim / 16; ++n) {
          out[n * 16] = acc.out[m][n][i];
          out[n * 16 + 8] = acc.out[m][n][i + 2];
        }
      }
    }
  }

  // By a whole block, after a barrier; another must follow. Finds the maximum and the sum of all
  // warps, and turns the maxima of the warps into their weights.
  __device__ void weigh() const {
    const int lane = threadIdx.x % kWarpSize;
    for (int head = threadIdx.x / kWarpSize; head < heads_; head += blockDim.x / kWarpSize) {
      const int row = lane * heads_ + head;
      const float mine = lane < warps_ ? max_[row] : -INFINITY;
      float max = mine;
#pragma unroll
      for (int mask = 1; mask < kWarpSize; mask *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, mask));
      }
      const float weight = mine == -INFINITY ? 0.0f : exp2f(mine - max);
      float sum = lane < warps_ ? weight * sum_[row] : 0.0f;
#pragma unroll
      for (int mask = 1; mask < kWarpSize; mask *= 2) {
        sum += __shfl_xor_sync(kFullMask, sum, mask);
      }
      if (lane < warps_) max_[row] = weight;
      if (lane == 0) {
        merged_max_[head] = max;
        merged_sum_[head] = sum;
      }
    }
  }

  // After that barrier: the sum over the warps of one element of the output.
  __device__ float out(int head, int d) const {
    float sum = 0.0f;
#pragma unroll 8
    for (int warp = 0; warp < warps_; ++warp) {
      const int row = warp * heads_ + head;
      sum += max_[row] * out_[row * kPitch + d];
    }
    return sum;
  }
  __device__ float max(int head) const { return merged_max_[head]; }
  __device__ float sum(int head) const { return merged_sum_[head]; }

 private:
  static constexpr int kPitch = kHeadDim + 4;

  int warps_, heads_;
  float* out_;         // [warps, heads, kPitch]
  float* max_;         // [warps, heads]; after weigh() weights
  float* sum_;         // [warps, heads]
  float* merged_max_;  // [heads]
  float* merged_sum_;  // [heads]
};

// What the blocks of a cluster send a block: the maxima and sums of all of them, and the outputs of
// the elements that this block merges.
struct Received {
  // Elements of the output of `heads` queries that one of `splits` blocks merges.
  static constexpr int share(int splits, int heads, int head_dim) {
    return (heads * head_dim + splits - 1) / splits;
  }
  static constexpr int bytes(int splits, int heads, int head_dim) {
    return splits > 1 ? splits * (2 * heads + share(splits, heads, head_dim)) * 4 : 0;
  }

  __device__ Received(ArrivalBarrier& barrier, void* memory, int splits, int heads)
      : barrier(barrier),
        max(static_cast<float*>(memory)),
        sum(max + splits * heads),
        out(sum + splits * heads) {}

  ArrivalBarrier& barrier;
  float* max;  // [splits, heads]
  float* sum;  // [splits, heads]
  float* out;  // [splits, share]
};

// One element of the result and, with d 0, its log-sum-exp, from a maximum and sums in base 2.
template <typename T, int kHeadDim>
__device__ __forceinline__ void write_result(const GatherAttentionParams& p, int64_t row, int d,
                                             float max, float sum, float out) {
  const bool empty = sum == 0.0f;
  static_cast<T*>(p.out)[row * kHeadDim + d] = static_cast<T>(empty ? 0.0f : out / sum);
  if (d == 0) p.lse[row] = empty ? -INFINITY : (max + log2f(sum)) * kLn2;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// By the blocks of a cluster, all of which have begun: sends the others their shares of this
// block's results, and writes the union of what all of them sent this block. Rows of the result
// from first_row on are the `heads` queries. A block may end after that: all that is sent to it has
// arrived.
template <typename T, int kHeadDim>
__device__ __forceinline__ void merge_blocks(const GatherAttentionParams& p, int rank, int splits,
                                             const Partials<kHeadDim>& partials,
                                             const Received& received, int64_t first_row,
                                             int heads) {
  const int elements = heads * kHeadDim;
  const int share = Received::share(splits, heads, kHeadDim);
  const int mine = max(min(share, elements - rank * share), 0);
  if (threadIdx.x == 0) received.barrier.expect(splits * (2 * heads + mine) * 4);
  for (int i = threadIdx.x; i < elements; i += blockDim.x) {
    const int head = i / kHeadDim, d = i % kHeadDim, block = i / share;
    send(shared_address(received.out + rank * share + i % share, block),
         __float_as_uint(partials.out(head, d)), shared_address(&received.barrier, block));
    if (d < splits) {
      const uint32_t barrier = shared_address(&received.barrier, d);
      send(shared_address(received.max + rank * heads + head, d),
           __float_as_uint(partials.max(head)), barrier);
      send(shared_address(received.sum + rank * heads + head, d),
           __float_as_uint(partials.sum(head)), barrier);
    }
  }
  received.barrier.wait(0);
  for (int j = threadIdx.x; j < mine; j += blockDim.x) {
    const int head = (rank * share + j) / kHeadDim, d = (rank * share + j) % kHeadDim;
    float maxima[kMaxCluster];
    float max = -INFINITY;
#pragma unroll
    for (int block = 0; block < kMaxCluster; ++block) {
      maxima[block] = block < splits ? received.max[block * heads + head] : -INFINITY;
      max = fmaxf(max, maxima[block]);
    }
    float sum = 0.0f, out = 0.0f;
#pragma unroll
    for (int block = 0; block < kMaxCluster; ++block) {
      if (maxima[block] == -INFINITY) continue;
      const float weight = exp2f(maxima[block] - max);
      sum += weight * received.sum[block * heads + head];
      out += weight * received.out[block * share + j];
    }
    write_result<T, kHeadDim>(p, first_row + head, d, max, sum, out);
  }
}

#endif

}  // namespace hata
