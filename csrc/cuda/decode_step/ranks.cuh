#pragma once

#include <cuda_fp16.h>

#include <cstdint>

// 16-bit ranks in shared memory, and comparing eight of them at a time.
namespace hata::step {

// One block's slice of a sequence, as one query token sees it: positions outside first..last do not
// compete, because they are selected in any case or not visible.
struct CompetingSlice {
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

// The ranks from the least to the most, both included.
struct RankRange {
  uint32_t least, most;
};

template <typename T>
struct Pair {
  T first, second;
};

// What is kept of two ranks, in one word and each by itself.
struct KeptPair {
  uint32_t pair;
  uint32_t first, second;
};

// Ranks as they are kept, two in a word, so that they are compared two in one instruction as
// float16 numbers. Without norms that is the ranks themselves, which below infinity have the order
// of the float16 numbers with the same bits. With norms it is minus the float16 scores, never -0:
// in reverse they have the order of the ranks, and NaN, whose rank is 0, is 0x7fff.
template <bool kNorms>
struct KeptRanks {
  // Keeps two ranks without norms.
  __device__ static KeptPair pair(uint32_t first, uint32_t second) {
    return {first | second << 16, first, second};
  }
  // Keeps two ranks with norms: from minus two scores before their norms, a pair of float16.
  __device__ static KeptPair pair(float first, float second, uint32_t norms) {
    const float2 factors = __half22float2(reinterpret_cast<const __half2&>(norms));
    const __half2 scores =
        __floats2half2_rn(__fmul_rn(first, factors.x), __fmul_rn(second, factors.y));
    const __half2 nonzero = __hadd2_rn(scores, zero());  // -0 becomes 0
    const auto pair = reinterpret_cast<const uint32_t&>(nonzero);
    return {pair, pair & 0xffffu, pair >> 16};
  }

  // Turns what is kept into ranks and back: positive numbers are reversed.
  __device__ static uint32_t swap(uint32_t pair) {
    if (!kNorms) return pair;
    const uint32_t negative = __hlt2_mask(reinterpret_cast<const __half2&>(pair), zero());
    return pair ^ (~negative & 0x7fff7fffu);
  }

  // Returns the rank of what is kept of one, or of two.
  __device__ static uint32_t rank(uint16_t kept) { return swap(kept) & 0xffffu; }
  __device__ static Pair<uint32_t> ranks(const KeptPair& kept) {
    if (!kNorms) return {kept.first, kept.second};
    const uint32_t pair = swap(kept.pair);
    return {pair & 0xffffu, pair >> 16};
  }

  // Whether ranks compare with those of a range as float16 numbers do: what is kept of its ends
  // must not be NaN, unless it is what no rank lies above.
  __device__ static bool compare_as_half(const RankRange& range) {
    constexpr uint32_t kInfinity = 0x7c00;
    return kNorms ? range.least >= rank(kInfinity) : range.most < kInfinity;
  }

  // The rank that no number has would be kept as -0 and compare as 0, which another rank is.
  __device__ static uint32_t nonzero(uint32_t rank) { return rank + (kNorms && rank == 0x8000); }

  // What is kept of a rank, twice.
  __device__ static __half2 both(uint32_t rank) {
    const uint32_t kept = kNorms && rank < 0x8000 ? rank ^ 0x7fff : rank;
    return __half2half2(__ushort_as_half(static_cast<uint16_t>(kept)));
  }

  // Returns 0xffff for each of two ranks that lies above another, or not below it.
  __device__ static uint32_t above(const __half2& pair, const __half2& other) {
    return kNorms ? __hlt2_mask(pair, other) : __hgt2_mask(pair, other);
  }
  __device__ static uint32_t not_below(const __half2& pair, const __half2& other) {
    return kNorms ? __hle2_mask(pair, other) : __hge2_mask(pair, other);
  }

 private:
  __device__ static __half2 zero() { return __float2half2_rn(0.0f); }
};

// Lets ranks from a bound on pass, and where ranks do not compare as float16 numbers, others too.
template <bool kNorms>
class KeptBound {
 public:
  __device__ KeptBound(uint32_t rank) {
    using Kept = KeptRanks<kNorms>;
    constexpr uint16_t kInfinity = 0x7c00;
    if (!kNorms) {
      bound_ = rank;
    } else {
      const __half2 both = Kept::both(Kept::nonzero(max(rank, Kept::rank(kInfinity))));
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

// Which of some ranks lie above a range, and which in it: bit i is about rank i.
struct RankBits {
  uint32_t above, within;
};

// Compares eight ranks, aligned to 16 bytes, with a range.
template <bool kNorms>
__device__ __forceinline__ RankBits compare_ranks(const uint16_t* ranks, const RankRange& range) {
  using Kept = KeptRanks<kNorms>;
  RankBits bits{};
  if (Kept::compare_as_half(range)) {
    const uint4 eight = *reinterpret_cast<const uint4*>(ranks);  // in one load
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
    const uint32_t rank = Kept::rank(ranks[i]);
    bits.above |= static_cast<uint32_t>(rank > range.most) << i;
    bits.within |= static_cast<uint32_t>(rank >= range.least && rank <= range.most) << i;
  }
  return bits;
}

}  // namespace hata::step
