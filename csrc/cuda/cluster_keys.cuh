#pragma once

#include <cuda_fp16.h>

#include "cuda/check.h"

// 16-bit keys in shared memory, and comparing eight of them at a time.
namespace hata {

// One block's part of a row of keys. Positions outside first..last do not compete.
struct KeySlice {
  int begin, end;
  int first, last;

  // Bit i: does position + i compete?
  __device__ __forceinline__ uint32_t competing(int position) const {
    const int stop = min(last, end);
    if (position >= first && position + 32 <= stop) return ~0u;
    if (position + 32 <= first || position >= stop) return 0;
    const uint32_t from_first = position < first ? ~0u << (first - position) : ~0u;
    return position + 32 > stop ? from_first & ~0u >> (position + 32 - stop) : from_first;
  }
};

// Keys from the least to the most.
struct KeyRange {
  uint32_t least, most;
};

template <typename T>
struct Pair {
  T first, second;
};

// What is kept of two keys, in one word and each by itself.
struct KeptPair {
  uint32_t pair;
  uint32_t first, second;
};

// 16-bit keys as they are kept, two in a word. Without norms that is the keys themselves, which
// below infinity have the order of the float16 numbers with the same bits. With norms it is minus
// the float16 scores, never -0: in reverse they have the order of the keys, and NaN, whose key is
// 0, is 0x7fff. float16 numbers are compared two in one instruction.
template <bool kNorms>
struct KeptKeys {
  // Without norms.
  __device__ static KeptPair pair(uint32_t first, uint32_t second) {
    return {first | second << 16, first, second};
  }
  // With norms: from minus two scores before their norms, a pair of float16.
  __device__ static KeptPair pair(float first, float second, uint32_t norms) {
    const float2 factors = __half22float2(reinterpret_cast<const __half2&>(norms));
    const __half2 scores =
        __floats2half2_rn(__fmul_rn(first, factors.x), __fmul_rn(second, factors.y));
    const __half2 nonzero = __hadd2_rn(scores, zero());  // -0 becomes 0
    const auto pair = reinterpret_cast<const uint32_t&>(nonzero);
    return {pair, pair & 0xffffu, pair >> 16};
  }

  // From what is kept to the keys and back: positive numbers are reversed.
  __device__ static uint32_t swap(uint32_t pair) {
    if (!kNorms) return pair;
    const uint32_t negative = __hlt2_mask(reinterpret_cast<const __half2&>(pair), zero());
    return pair ^ (~negative & 0x7fff7fffu);
  }

  // The key of one that is kept.
  __device__ static uint32_t key(uint16_t kept) { return swap(kept) & 0xffffu; }
  __device__ static Pair<uint32_t> keys(const KeptPair& kept) {
    if (!kNorms) return {kept.first, kept.second};
    const uint32_t pair = swap(kept.pair);
    return {pair & 0xffffu, pair >> 16};
  }

  // Whether keys compare with those of a range as float16 numbers do: what is kept of its ends must
  // not be NaN, unless it is what no key lies above.
  __device__ static bool compare_as_half(const KeyRange& range) {
    constexpr uint32_t kInfinity = 0x7c00;
    return kNorms ? range.least >= key(kInfinity) : range.most < kInfinity;
  }

  // The key that no number has would be kept as -0 and compare as 0, which another key is.
  __device__ static uint32_t nonzero(uint32_t key) { return key + (kNorms && key == 0x8000); }

  // What is kept of a key, twice.
  __device__ static __half2 both(uint32_t key) {
    const uint32_t kept = kNorms && key < 0x8000 ? key ^ 0x7fff : key;
    return __half2half2(__ushort_as_half(static_cast<uint16_t>(kept)));
  }

  // 0xffff for each of two keys above another, or not below it.
  __device__ static uint32_t above(const __half2& pair, const __half2& other) {
    return kNorms ? __hlt2_mask(pair, other) : __hgt2_mask(pair, other);
  }
  __device__ static uint32_t not_below(const __half2& pair, const __half2& other) {
    return kNorms ? __hle2_mask(pair, other) : __hge2_mask(pair, other);
  }

 private:
  __device__ static __half2 zero() { return __float2half2_rn(0.0f); }
};

// Lets keys from a bound on pass, and where keys do not compare as float16 numbers, others too.
template <bool kNorms>
class KeptBound {
 public:
  __device__ KeptBound(uint32_t key) {
    using Kept = KeptKeys<kNorms>;
    constexpr uint16_t kInfinity = 0x7c00;
    if (!kNorms) {
      bound_ = key;
    } else {
      const __half2 both = Kept::both(Kept::nonzero(max(key, Kept::key(kInfinity))));
      bound_ = reinterpret_cast<const uint32_t&>(both);
    }
  }

  __device__ __forceinline__ Pair<bool> lets_pass(const KeptPair& kept) const {
    if (!kNorms) return {kept.first >= bound_, kept.second >= bound_};
    const uint32_t below = __hgt2_mask(reinterpret_cast<const __half2&>(kept.pair),
                                       reinterpret_cast<const __half2&>(bound_));
    return {(below & 0xffffu) == 0, below >> 16 == 0};
  }

 private:
  uint32_t bound_;
};

// Which of some keys lie above a range of keys, and which in it: bit i is about key i.
struct KeyBits {
  uint32_t above, within;
};

// Of eight keys, aligned to 16 bytes.
template <bool kNorms>
__device__ __forceinline__ KeyBits compare_keys(const uint16_t* keys, const KeyRange& range) {
  using Kept = KeptKeys<kNorms>;
  KeyBits bits{};
  if (Kept::compare_as_half(range)) {
    const uint4 eight = *reinterpret_cast<const uint4*>(keys);  // in one load
    const uint32_t pairs[] = {eight.x, eight.y, eight.z, eight.w};
    const __half2 most = Kept::both(range.most), least = Kept::both(Kept::nonzero(range.least));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& pair = reinterpret_cast<const __half2&>(pairs[i]);
      bits.above |= Kept::above(pair, most) & (0x20001u << 2 * i);
      bits.within |= Kept::not_below(pair, least) & (0x20001u << 2 * i);
    }
    bits.within &= ~bits.above;
    return {(bits.above | bits.above >> 16) & 0xffu, (bits.within | bits.within >> 16) & 0xffu};
  }
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const uint32_t key = Kept::key(keys[i]);
    bits.above |= static_cast<uint32_t>(key > range.most) << i;
    bits.within |= static_cast<uint32_t>(key >= range.least && key <= range.most) << i;
  }
  return bits;
}

}  // namespace hata
