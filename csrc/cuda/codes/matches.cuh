#pragma once

#include <cuda_fp16.h>

#include "cuda/codes/reader.cuh"
#include "cuda/primitives/mma.cuh"
#include "query_planes.h"

// Counting the matches of codes with query planes, shared by every kernel that scans.
namespace hata {

// The products take planes two at a time.
constexpr int padded_planes(int num_planes) {
  return (num_planes + 1) / 2 * 2;
}

// What a count of k & s_p, k a code and s_p a plane, is multiplied with for `matches`, in shared
// memory, those of a product's two planes together. An odd number of planes leaves room for one
// that is all ones, which counts the bits of a code k.
struct PlaneWeights {
  int2 pairs[kMaxPlanes / 2];

  // Sets the weights, by at least kMaxPlanes threads.
  __device__ void set(int weight_sum, int thread) {
    const int planes = num_planes(weight_sum);
    if (thread >= kMaxPlanes) return;
    int weight = thread < planes ? 2 * plane_weight(thread, weight_sum) : 0;
    if (thread == planes && planes % 2 == 1) weight = -weight_sum;
    reinterpret_cast<int*>(pairs)[thread] = weight;
  }
};

// Writes the plane of ones behind the others where their number is odd, by any number of threads.
__device__ __forceinline__ void add_ones(uint32_t* planes, int num_planes, int num_words,
                                         int thread, int num_threads) {
  if (num_planes % 2 == 0) return;
  for (int i = thread; i < num_words; i += num_threads) planes[num_planes * num_words + i] = ~0u;
}

// The planes of one query token in shared memory, as the scan reads them. `column` is what
// plane_column() gave this thread; base = sum_p w_p (num_bits - popcount(plane_p)).
struct ScanPlanes {
  const uint32_t* column;
  const PlaneWeights& weights;
  int num_planes;
  int base;
};

// Returns where a thread reads its column of the products. Column n = lane / 4 holds a plane of
// parity n % 2 where the words of quad member n / 2 are not zero; elsewhere it reads `zeros`, which
// is as large as `planes` [padded_planes, kNumWords].
template <int kNumWords>
__device__ __forceinline__ const uint32_t* plane_column(const uint32_t* planes,
                                                        const uint32_t* zeros) {
  const int lane = threadIdx.x % kWarpSize;
  return (lane / 8 == lane % 4 ? planes : zeros) + lane / 4 % 2 * kNumWords;
}

// Returns ScanPlanes::base, by a whole warp.
template <int kNumWords>
__device__ int plane_base(const uint32_t* planes, int weight_sum) {
  int base = 0;
  for (int i = threadIdx.x % kWarpSize; i < num_planes(weight_sum) * kNumWords; i += kWarpSize) {
    base += plane_weight(i / kNumWords, weight_sum) * (kWordBits - __popc(planes[i]));
  }
  return __reduce_add_sync(kFullMask, base);
}

// Adds the weighted counts of planes 2 tile and 2 tile + 1 for every position of the units.
template <int kNumWords, int kUnits>
__device__ __forceinline__ void count_tile(const CodeUnit<kNumWords> (&units)[kUnits],
                                           const ScanPlanes& planes, int tile,
                                           int (&matches)[kUnits * CodeUnit<kNumWords>::kTokens]) {
  using Unit = CodeUnit<kNumWords>;
  uint32_t b[kNumWords];
#pragma unroll
  for (int w = 0; w < kNumWords; ++w) b[w] = planes.column[tile * 2 * kNumWords + w];
  const int2 weight = planes.weights.pairs[tile];
#pragma unroll
  for (int i = 0; i < kUnits * Unit::kTokens; i += 2) {
    const uint32_t* words = units[i / Unit::kTokens].words + i % Unit::kTokens * kNumWords;
    int counts[4] = {};
#pragma unroll
    for (int w = 0; w + 1 < kNumWords; w += 2) {
      mma_m16n8k256(counts, {words[2 * w], words[2 * w + 1], words[2 * w + 2], words[2 * w + 3]},
                    {b[w], b[w + 1]});
    }
    if constexpr (kNumWords % 2 == 1) {
      mma_m16n8k128(counts, {words[2 * kNumWords - 2], words[2 * kNumWords - 1]}, b[kNumWords - 1]);
    }
    // One after the other, each of them is one instruction; their sum would need another.
    matches[i] += weight.x * counts[0];
    matches[i] += weight.y * counts[1];
    matches[i + 1] += weight.x * counts[2];
    matches[i + 1] += weight.y * counts[3];
  }
}

// Computes offsets[i] = -weight_sum popcount(code_i), or 0 where the plane of ones brings it.
template <int kNumWords, int kUnits>
__device__ __forceinline__ void offset_matches(
    const CodeUnit<kNumWords> (&units)[kUnits], int num_planes, int weight_sum,
    int (&offsets)[kUnits * CodeUnit<kNumWords>::kTokens]) {
  using Unit = CodeUnit<kNumWords>;
#pragma unroll
  for (int i = 0; i < kUnits * Unit::kTokens; ++i) {
    offsets[i] = 0;
    if (num_planes % 2 == 1) continue;
#pragma unroll
    for (int w = 0; w < kNumWords; ++w) {
      offsets[i] -= __popc(units[i / Unit::kTokens].words[Unit::place(i % Unit::kTokens, w)]);
    }
    offsets[i] *= weight_sum;
  }
}

// Copies the units to where products take them. Words that are loaded together lie in registers in
// another order, and by itself the compiler copies them anew for every product.
template <int kNumWords, int kUnits>
__device__ __forceinline__ void copy_for_products(const CodeUnit<kNumWords> (&units)[kUnits],
                                                  CodeUnit<kNumWords> (&copies)[kUnits]) {
  // Grids are flat where codes are scanned, which the compiler does not know: it cannot see that
  // these are copies, and makes them once.
  const uint32_t zero = kNumWords > 1 ? blockIdx.z : 0;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
#pragma unroll
    for (int w = 0; w < CodeUnit<kNumWords>::kWords; ++w) {
      copies[i].words[w] = units[i].words[w] ^ zero;
    }
  }
}

// Computes matches[i] = sum_p w_p (num_bits - popcount(code_i ^ plane_p)) for every position of the
// units, by a whole warp, from their offsets. popcount(k ^ s) = popcount(k) + popcount(s) - 2
// popcount(k & s), and the binary product counts k & s: its 16 rows are the codes of eight quads,
// two a thread, and of its columns the pair 2c, 2c + 1 holds two planes where only the words of
// quad member c are not zero. So each thread is given the counts of its own codes.
template <int kNumWords, int kUnits>
__device__ __forceinline__ void count_matches(
    const CodeUnit<kNumWords> (&units)[kUnits],
    const int (&offsets)[kUnits * CodeUnit<kNumWords>::kTokens], const ScanPlanes& planes,
    int (&matches)[kUnits * CodeUnit<kNumWords>::kTokens]) {
#pragma unroll
  for (int i = 0; i < kUnits * CodeUnit<kNumWords>::kTokens; ++i) {
    matches[i] = planes.base + offsets[i];
  }
  if (planes.num_planes == 3 || planes.num_planes == 4) {  // query_bits 3 and 4, groups 4 to 15
    CodeUnit<kNumWords> copies[kUnits];
    copy_for_products(units, copies);
    count_tile(copies, planes, 0, matches);
    count_tile(copies, planes, 1, matches);
  } else {
#pragma unroll 1
    for (int tile = 0; 2 * tile < planes.num_planes; ++tile) {
      count_tile(units, planes, tile, matches);
    }
  }
}

// Divides a score, or what is proportional to it, by kNumBits, before it is multiplied with a norm.
// The division is exact where kNumBits is a power of two, and then a product with its reciprocal is
// the same.
template <int kNumBits>
__device__ __forceinline__ float score_per_bit(float score) {
  return (kNumBits & (kNumBits - 1)) == 0 ? __fmul_rn(score, 1.0f / kNumBits)
                                          : __fdiv_rn(score, static_cast<float>(kNumBits));
}

// Returns the score that a key with this norm has, as bits of a float16.
template <int kNumBits>
__device__ __forceinline__ uint16_t float16_score(int matches, int weight_sum, uint16_t norm) {
  const auto score = static_cast<float>(2 * matches - weight_sum * kNumBits);
  return __half_as_ushort(__float2half_rn(
      __fmul_rn(score_per_bit<kNumBits>(score), __half2float(__ushort_as_half(norm)))));
}

}  // namespace hata
