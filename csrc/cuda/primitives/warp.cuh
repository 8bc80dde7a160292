#pragma once

#include <cmath>
#include <cstdint>

// What the lanes of a warp and the warps of a block tell each other.
namespace hata {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

// Returns threadIdx.x % kWarpSize, asked for anew: what follows from it is not kept in registers
// over a loop around the call.
__device__ __forceinline__ int lane_here() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The sum over the lanes up to this one.
__device__ __forceinline__ uint32_t warp_inclusive_scan(uint32_t value) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kFullMask, value, offset);
    if (threadIdx.x % kWarpSize >= offset) value += other;
  }
  return value;
}

// The sum over the threads before this one, and in `total` over the whole block.
__device__ inline uint32_t block_exclusive_scan(uint32_t value, uint32_t& total) {
  __shared__ uint32_t warp_sums[kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t inclusive = warp_inclusive_scan(value);
  __syncthreads();  // the last scan's sums have been read
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  const uint32_t warp_sum =
      warp_inclusive_scan(lane * kWarpSize < blockDim.x ? warp_sums[lane] : 0);
  total = __shfl_sync(kFullMask, warp_sum, kWarpSize - 1);
  const uint32_t before = __shfl_sync(kFullMask, warp_sum, max(warp - 1, 0));
  return (warp == 0 ? 0 : before) + inclusive - value;
}

}  // namespace hata
