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

// Combine the values of lanes that differ in the bits of these masks: the four lanes of a quad,
// whose numbers differ in bits 1 and 2; lanes of the same place in their quads (4, 8, 16); a whole
// warp. All of those lanes return the result.
enum class Lanes { kQuad, kAcrossQuads, kWarp };

template <Lanes kLanes, typename T, typename Combine>
__device__ __forceinline__ T combine_lanes(T value, const Combine& combine) {
  constexpr int kFirst = kLanes == Lanes::kAcrossQuads ? 4 : 1;
  constexpr int kLast = kLanes == Lanes::kQuad ? 2 : kWarpSize / 2;
#pragma unroll
  for (int mask = kFirst; mask <= kLast; mask *= 2) {
    value = combine(value, __shfl_xor_sync(kFullMask, value, mask));
  }
  return value;
}
template <Lanes kLanes>
__device__ __forceinline__ float max_of_lanes(float value) {
  return combine_lanes<kLanes>(value, [](float a, float b) { return fmaxf(a, b); });
}
template <Lanes kLanes>
__device__ __forceinline__ float sum_of_lanes(float value) {
  return combine_lanes<kLanes>(value, [](float a, float b) { return a + b; });
}
template <Lanes kLanes>
__device__ __forceinline__ uint32_t or_of_lanes(uint32_t value) {
  return combine_lanes<kLanes>(value, [](uint32_t a, uint32_t b) { return a | b; });
}

// Returns the sum over the lanes up to this one.
__device__ __forceinline__ uint32_t warp_inclusive_scan(uint32_t value) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kFullMask, value, offset);
    if (threadIdx.x % kWarpSize >= offset) value += other;
  }
  return value;
}

// Returns the sum over the threads before this one, and in `total` over the whole block.
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
