#pragma once

#include <cuda_fp8.h>

#include "cuda/primitives/mma.cuh"

// Float8 (e4m3 without infinities) from and to 16-bit floats.
namespace hata {

// Whether the device has an instruction for it: compute capability 8.9 and newer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
inline constexpr bool kConvertsFloat8 = true;
#else
inline constexpr bool kConvertsFloat8 = false;
#endif

// Returns two float8, `pair` in its lower half, as a pair of float16, which has all their values.
__device__ __forceinline__ uint32_t float8_to_half2(uint32_t pair) {
  if constexpr (kConvertsFloat8) {
    const __half2_raw halves =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
    return static_cast<uint32_t>(halves.y) << 16 | halves.x;
  }
  // A float8 with its bits where a float16 has those of the same meaning is 2^-8 times as large.
  const uint32_t bits = __byte_perm(pair, 0, 0x1404);  // a float8 in the upper byte of each half
  const uint32_t magnitudes = (bits & 0x7f007f00u) >> 1;
  const __half2 scaled =
      __hmul2(reinterpret_cast<const __half2&>(magnitudes), __float2half2_rn(256.0f));
  // The largest magnitude, 480, stands for NaN.
  return (bits & 0x80008000u) | __heq2_mask(scaled, __float2half2_rn(480.0f)) |
         reinterpret_cast<const uint32_t&>(scaled);
}

// Returns eight elements of T, divided by `scale`, as float8. What is too large becomes 448.
template <typename T>
__device__ __forceinline__ uint2 to_float8(const uint4& elements, float scale) {
  const auto convert = [&](uint32_t pair) -> uint32_t {
    const float2 x = unpack(pair, T{});
    return __nv_cvt_float2_to_fp8x2({x.x / scale, x.y / scale}, __NV_SATFINITE, __NV_E4M3);
  };
  return {convert(elements.x) | convert(elements.y) << 16, convert(elements.z) | convert(elements.w)
                                                                                     << 16};
}

}  // namespace hata
