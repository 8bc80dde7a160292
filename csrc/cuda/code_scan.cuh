#pragma once

#include <cuda_fp16.h>

#include "hamming_score.h"
#include "query_planes.h"
#include "selection.h"

// Loading codes and counting their matches with query planes, shared by every kernel that scans.
namespace hata {

template <int kNumWords>
struct Code {
  uint32_t words[kNumWords];
};

template <int kNumWords>
__device__ __forceinline__ Code<kNumWords> load_code(const uint32_t* from) {
  Code<kNumWords> code;
  if constexpr (kNumWords % 4 == 0) {
#pragma unroll
    for (int w = 0; w < kNumWords; w += 4) {
      const uint4 piece = __ldg(reinterpret_cast<const uint4*>(from + w));
      code.words[w] = piece.x, code.words[w + 1] = piece.y;
      code.words[w + 2] = piece.z, code.words[w + 3] = piece.w;
    }
  } else if constexpr (kNumWords % 2 == 0) {
#pragma unroll
    for (int w = 0; w < kNumWords; w += 2) {
      const uint2 piece = __ldg(reinterpret_cast<const uint2*>(from + w));
      code.words[w] = piece.x, code.words[w + 1] = piece.y;
    }
  } else {
#pragma unroll
    for (int w = 0; w < kNumWords; ++w) code.words[w] = __ldg(from + w);
  }
  return code;
}

// matches[i] = sum_p w_p (num_bits - popcount(codes[i] ^ plane_p)), for planes [num_planes,
// kNumWords] in shared memory. A plane is read once for all the codes.
template <int kNumWords, int kCodes>
__device__ __forceinline__ void count_matches(const Code<kNumWords> (&codes)[kCodes],
                                              const uint32_t* planes, int num_planes,
                                              int weight_sum, int (&matches)[kCodes]) {
#pragma unroll
  for (int& m : matches) m = weight_sum * kNumWords * kWordBits;
  int weight = 1;
  for (int p = 0; p < num_planes; ++p) {
    if (p == num_planes - 1) weight = weight_sum - (weight - 1);
    uint32_t plane[kNumWords];
#pragma unroll
    for (int w = 0; w < kNumWords; ++w) plane[w] = planes[p * kNumWords + w];
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      int differing = 0;
#pragma unroll
      for (int w = 0; w < kNumWords; ++w) differing += __popc(codes[i].words[w] ^ plane[w]);
      matches[i] -= weight * differing;
    }
    weight *= 2;
  }
}

// The float16 score of a key with this norm, as bits. The division is exact where kNumBits is a
// power of two, and then a product with its reciprocal is the same.
template <int kNumBits>
__device__ __forceinline__ uint16_t float16_score(int matches, int weight_sum, uint16_t norm) {
  const float score = static_cast<float>(2 * matches - weight_sum * kNumBits);
  const float scaled = (kNumBits & (kNumBits - 1)) == 0
                           ? __fmul_rn(score, 1.0f / kNumBits)
                           : __fdiv_rn(score, static_cast<float>(kNumBits));
  return __half_as_ushort(__float2half_rn(__fmul_rn(scaled, __half2float(__ushort_as_half(norm)))));
}

}  // namespace hata
