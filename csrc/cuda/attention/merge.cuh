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
// and the sum, in base 2. Where several warps share their rows, each with some of the channels,
// they count as one.
class Partials {
 public:
  static constexpr int bytes(int warps, int heads, int head_dim) {
    return (warps * heads * (pitch(head_dim) + 2) + 2 * heads) * 4;
  }

  __device__ __forceinline__ Partials(void* memory, int warps, int heads, int head_dim)
      : head_dim(head_dim),
        warps_(warps),
        heads_(heads),
        out_(static_cast<float*>(memory)),
        max_(out_ + warps * heads * pitch(head_dim)),
        sum_(max_ + warps * heads),
        merged_max_(sum_ + warps * heads),
        merged_sum_(merged_max_ + heads) {}

  // Stores what warp `warp` has found in rows of T, whose values have a factor: the channels from
  // first_channel on.
  template <typename T, int kChannels, int kHeadTiles>
  __device__ __forceinline__ void store(const Accumulator<kChannels, kHeadTiles>& acc,
                                        float v_scale, int warp, int first_channel = 0) const {
    const int lane = threadIdx.x % kWarpSize;
    using Channels = OutputChannels<T>;
#pragma unroll
    for (int m = 0; m < kHeadTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = sum_of_lanes<Lanes::kAcrossQuads>(acc.sum[m][i]);
        const int head = m * kTileHeads + lane % 4 * 2 + i;
        if (head >= heads_) continue;
        const int entry = warp * heads_ + head;
        if (lane < 4) {
          max_[entry] = acc.max[m][i];
          sum_[entry] = sum;
        }
        float* out = out_ + entry * pitch(head_dim) + first_channel + lane / 4 * Channels::kStep;
#pragma unroll
        for (int n = 0; n < kChannels / 16; ++n) {
          out[n * 16] = acc.out[m][n][i] * v_scale;
          out[n * 16 + Channels::kNext] = acc.out[m][n][i + 2] * v_scale;
        }
      }
    }
  }

  // Finds the maximum and the sum of all warps, and turns the maxima of the warps into their
  // weights, by a whole block, after a barrier; another must follow.
  __device__ void weigh() const {
    const int lane = threadIdx.x % kWarpSize;
    for (int head = threadIdx.x / kWarpSize; head < heads_; head += blockDim.x / kWarpSize) {
      const int entry = lane * heads_ + head;
      const float mine = lane < warps_ ? max_[entry] : -INFINITY;
      const float max = max_of_lanes<Lanes::kWarp>(mine);
      const float weight = weight_in_union(mine, max);
      const float sum = sum_of_lanes<Lanes::kWarp>(lane < warps_ ? weight * sum_[entry] : 0.0f);
      if (lane < warps_) max_[entry] = weight;
      if (lane == 0) {
        merged_max_[head] = max;
        merged_sum_[head] = sum;
      }
    }
  }

  // Returns the sum over the warps of one element of the output, and the state that belongs to it,
  // after weigh() and a barrier.
  __device__ float out(int head, int d) const {
    float sum = 0.0f;
#pragma unroll 8
    for (int warp = 0; warp < warps_; ++warp) {
      const int entry = warp * heads_ + head;
      sum += max_[entry] * out_[entry * pitch(head_dim) + d];
    }
    return sum;
  }
  __device__ AttentionState state(int head) const { return {merged_max_[head], merged_sum_[head]}; }

  const int head_dim;

 private:
  static constexpr int pitch(int head_dim) { return head_dim + 4; }

  int warps_, heads_;
  float* out_;         // [warps, heads, pitch]
  float* max_;         // [warps, heads]; after weigh() weights
  float* sum_;         // [warps, heads]
  float* merged_max_;  // [heads]
  float* merged_sum_;  // [heads]
};

// What the blocks of a cluster send a block: the maxima and sums of all of them, and the outputs of
// the elements that this block merges.
struct Received {
  // Returns how many elements of the output of `heads` queries one of `splits` blocks merges.
  static constexpr int share(int splits, int heads, int head_dim) {
    return (heads * head_dim + splits - 1) / splits;
  }
  static constexpr int bytes(int splits, int heads, int head_dim) {
    return splits > 1 ? splits * (2 * heads + share(splits, heads, head_dim)) * 4 : 0;
  }

  // The same for any number of splits.
  static constexpr int most_bytes(int heads, int head_dim) {
    return (kMaxCluster * (2 * heads + 1) + heads * head_dim) * 4;
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

// Writes one element of the output. Its type is no template's: code that merges, the longest part
// of a kernel, is there once for all of them.
__device__ __forceinline__ void write_out(const AttentionParams& p, int64_t i, float out) {
  if (p.dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(p.out)[i] = __float2bfloat16_rn(out);
  } else {
    static_cast<__half*>(p.out)[i] = __float2half_rn(out);
  }
}

// Writes one channel of the finished result and, with d 0, its log-sum-exp.
__device__ __forceinline__ void write_result(const AttentionParams& p, int64_t query_idx,
                                             int head_dim, int d, const AttentionState& state,
                                             float out) {
  write_out(p, query_idx * head_dim + d, state.finish(out));
  if (d == 0) p.lse[query_idx] = state.lse();
}

// Writes the same of a split, for combine_splits_kernel; the part of split s of a query is
// s * num_queries_of(p) + query_idx.
template <int kHeadDim>
__device__ __forceinline__ void write_part(const AttentionParams& p, int64_t part, int d,
                                           const AttentionState& state, float out) {
  p.out_partial[part * kHeadDim + d] = state.finish(out);
  if (d == 0) p.lse_partial[part] = state.lse();
}

// grid: batch * q_len * num_heads, one thread an element: merges the first p.num_parts(query_idx)
// parts of a query, if there is more than one. Lane l of each warp weighs part l of 32, and each
// thread asks for its element of all of them at once.
template <typename Params>
__global__ void combine_splits_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  let_next_kernel_launch();
  const int64_t query_idx = blockIdx.x, num_queries = num_queries_of(p);
  const int num_parts = p.num_parts(query_idx), lane = threadIdx.x % kWarpSize;
  if (num_parts <= 1) return;
  float max = -INFINITY;
  for (int s = lane; s < num_parts; s += kWarpSize) {
    max = fmaxf(max, p.lse_partial[s * num_queries + query_idx]);
  }
  max = max_of_lanes<Lanes::kWarp>(max);
  float sum = 0.0f, out = 0.0f;
  for (int first = 0; first < num_parts; first += kWarpSize) {
    const int mine = first + lane;
    const float weight = mine < num_parts
                             ? share_of_union(p.lse_partial[mine * num_queries + query_idx], max)
                             : 0.0f;
    const float* parts =
        p.out_partial + (first * num_queries + query_idx) * p.cache.head_dim + threadIdx.x;
    float values[kWarpSize];
#pragma unroll
    for (int i = 0; i < kWarpSize; ++i) {
      values[i] = first + i < num_parts ? parts[i * num_queries * p.cache.head_dim] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kWarpSize; ++i) {
      const float share = __shfl_sync(kFullMask, weight, i);
      sum += share;
      out += share * values[i];
    }
  }
  write_out(p, query_idx * p.cache.head_dim + threadIdx.x, sum == 0.0f ? 0.0f : out / sum);
  if (threadIdx.x == 0) p.lse[query_idx] = sum == 0.0f ? -INFINITY : max + logf(sum);
}

template <typename Params>
void combine_splits(const Params& p, CudaStream stream, const char* op) {
  launch_kernel(combine_splits_kernel<Params>,
                {.grid = dim3(static_cast<unsigned>(num_queries_of(p))),
                 .threads = p.cache.head_dim,
                 .overlaps_previous = true},
                stream, op, p);
}

// Sends the other blocks of a cluster, all of which have begun, their shares of this block's
// results, and writes the union of what all of them sent this block. The results from first_query
// on are those of the `heads` queries. A block may end after that: all that is sent to it has
// arrived.
__device__ __forceinline__ void merge_blocks(const AttentionParams& p, int rank, int splits,
                                             const Partials& partials, const Received& received,
                                             int64_t first_query, int heads) {
  const int head_dim = partials.head_dim;
  const int elements = heads * head_dim;
  const int share = Received::share(splits, heads, head_dim);
  const int mine = max(min(share, elements - rank * share), 0);
  if (threadIdx.x == 0) received.barrier.expect(splits * (2 * heads + mine) * 4);
  for (int i = threadIdx.x; i < elements; i += blockDim.x) {
    const int head = i / head_dim, d = i % head_dim, block = i / share;
    send(shared_address(received.out + rank * share + i % share, block),
         __float_as_uint(partials.out(head, d)), shared_address(&received.barrier, block));
    if (d < splits) {
      const uint32_t barrier = shared_address(&received.barrier, d);
      const AttentionState state = partials.state(head);
      send(shared_address(received.max + rank * heads + head, d), __float_as_uint(state.max),
           barrier);
      send(shared_address(received.sum + rank * heads + head, d), __float_as_uint(state.sum),
           barrier);
    }
  }
  received.barrier.wait(0);
  for (int j = threadIdx.x; j < mine; j += blockDim.x) {
    const int head = (rank * share + j) / head_dim, d = (rank * share + j) % head_dim;
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
      const float weight = weight_in_union(maxima[block], max);
      sum += weight * received.sum[block * heads + head];
      out += weight * received.out[block * share + j];
    }
    write_result(p, first_query + head, head_dim, d, {max, sum}, out);
  }
}

}  // namespace hata
