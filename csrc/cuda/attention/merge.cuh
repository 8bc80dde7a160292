#pragma once

#include "attention.h"
#include "cuda/attention/rows.cuh"
#include "cuda/primitives/attention_state.cuh"
#include "cuda/primitives/cluster.cuh"
#include "cuda/primitives/launch.cuh"

// Merging the softmaxes of the warps of gather_attention and dense_attention, and of the blocks
// that share a list of rows: in a cluster, or by a second kernel.
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
__device__ __forceinline__ void write_result(const AttentionParams& p, int64_t row, int d,
                                             float max, float sum, float out) {
  const bool empty = sum == 0.0f;
  static_cast<T*>(p.out)[row * kHeadDim + d] = static_cast<T>(empty ? 0.0f : out / sum);
  if (d == 0) p.lse[row] = empty ? -INFINITY : (max + log2f(sum)) * kLn2;
}

// The same for combine_splits_kernel; the part of split s of a row is s * num_rows_of(p) + row.
template <int kHeadDim>
__device__ __forceinline__ void write_part(const AttentionParams& p, int64_t part, int d, float max,
                                           float sum, float out) {
  const bool empty = sum == 0.0f;
  p.out_partial[part * kHeadDim + d] = empty ? 0.0f : out / sum;
  if (d == 0) p.lse_partial[part] = empty ? -INFINITY : (max + log2f(sum)) * kLn2;
}

// grid: batch * q_len * num_heads, one thread an element: merges the first p.num_parts(row) parts
// of a row, if there is more than one. Lane l of each warp weighs part l of 32, and each thread
// asks for its element of all of them at once.
template <typename T, typename Params>
__global__ void combine_splits_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  let_next_kernel_launch();
  const int64_t row = blockIdx.x, num_rows = num_rows_of(p);
  const int num_parts = p.num_parts(row), lane = threadIdx.x % kWarpSize;
  if (num_parts <= 1) return;
  float max = -INFINITY;
  for (int s = lane; s < num_parts; s += kWarpSize) {
    max = fmaxf(max, p.lse_partial[s * num_rows + row]);
  }
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    max = fmaxf(max, __shfl_xor_sync(kFullMask, max, mask));
  }
  float sum = 0.0f, out = 0.0f;
  for (int first = 0; first < num_parts; first += kWarpSize) {
    const int mine = first + lane;
    const float weight =
        mine < num_parts ? state_weight(p.lse_partial[mine * num_rows + row], max) : 0.0f;
    const float* parts = p.out_partial + (first * num_rows + row) * p.cache.head_dim + threadIdx.x;
    float values[kWarpSize];
#pragma unroll
    for (int i = 0; i < kWarpSize; ++i) {
      values[i] = first + i < num_parts ? parts[i * num_rows * p.cache.head_dim] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kWarpSize; ++i) {
      const float share = __shfl_sync(kFullMask, weight, i);
      sum += share;
      out += share * values[i];
    }
  }
  static_cast<T*>(p.out)[row * p.cache.head_dim + threadIdx.x] =
      static_cast<T>(sum == 0.0f ? 0.0f : out / sum);
  if (threadIdx.x == 0) p.lse[row] = sum == 0.0f ? -INFINITY : max + logf(sum);
}

template <typename T, typename Params>
void combine_splits(const Params& p, CudaStream stream, const char* op) {
  launch_kernel(combine_splits_kernel<T, Params>,
                {.grid = dim3(static_cast<unsigned>(num_rows_of(p))),
                 .threads = p.cache.head_dim,
                 .overlaps_previous = true},
                stream, op, p);
}

// By the blocks of a cluster, all of which have begun: sends the others their shares of this
// block's results, and writes the union of what all of them sent this block. Rows of the result
// from first_row on are the `heads` queries. A block may end after that: all that is sent to it has
// arrived.
template <typename T, int kHeadDim>
__device__ __forceinline__ void merge_blocks(const AttentionParams& p, int rank, int splits,
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

}  // namespace hata
