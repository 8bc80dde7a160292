#pragma once

#include "cuda/codes/matches.cuh"
#include "cuda/primitives/mma.cuh"

// Scoring codes for four query tokens at a time. With c_i as in query_planes.h, the matches of a
// code are base + sum_i c_i k_i, k_i its bits as 0 and 1, and an 8-bit product adds that up for
// every token at once, where products of bits need one plane after another of each. A code becomes
// bytes by masks alone: byte b of (word >> 4 h) & 0x01010101 << i is 2^i where bit 8 b + 4 h + i is
// set, so the weight of that bit is c_i 2^(3 - i), and sums are eight times as large.
namespace hata {

constexpr int kTokensAtOnce = 4;
constexpr int kSumShift = 3;
constexpr int kMostTokenWeight = 127 >> kSumShift;  // |c_i|, at most the weight sum

// Whether there is anything to gain, and weights are bytes.
template <int kNumWords>
constexpr bool scores_at_once(int q_len, int weight_sum) {
  return q_len > (kNumWords <= 2 ? 1 : 2) && weight_sum <= kMostTokenWeight;
}

// The weights of up to kMaxTokens query tokens, in shared memory.
template <int kMaxTokens, int kMaxWords>
struct TokenWeights {
  static constexpr int kBytes = 8;  // words of weights for a word of a code, [i, h]
  static constexpr int kPair = kMaxWords * 2 * kBytes;

  // Zeros begin 16 banks before the others.
  alignas(16) uint32_t zeros[kPair + 2 * kBytes - 4];
  uint32_t masks[4];                       // 0x01010101 << i
  uint32_t pairs[kMaxTokens / 2 * kPair];  // [pairs of tokens, words, 2 tokens, kBytes]

  // Makes the weights from planes [q_len, pitch] in shared memory, by a whole block, between
  // barriers.
  __device__ void set(const uint32_t* planes, int pitch, int num_words, int q_len, int weight_sum) {
    for (int i = threadIdx.x; i < kPair; i += blockDim.x) zeros[i] = 0;
    if (threadIdx.x < 4) masks[threadIdx.x] = 0x01010101u << threadIdx.x;
    const int num_tokens = (q_len + kTokensAtOnce - 1) / kTokensAtOnce * kTokensAtOnce;
    for (int i = threadIdx.x; i < num_tokens * num_words * kBytes; i += blockDim.x) {
      const int bit = i % kBytes / 2, shift = i % 2 * 4 + bit;
      const int word = i / kBytes % num_words, token = i / kBytes / num_words;
      const uint32_t scale = 1u << (kSumShift - bit);
      uint32_t weights = 0;
      if (token < q_len) {
        for (int p = 0; p < num_planes(weight_sum); ++p) {
          const uint32_t plane = planes[token * pitch + p * num_words + word];
          weights += (plane >> shift & 0x01010101u) * (2 * scale * plane_weight(p, weight_sum));
        }
        weights = __vsub4(weights, scale * weight_sum * 0x01010101u);
      }
      pairs[token / 2 * kPair + (word * 2 + token % 2) * kBytes + i % kBytes] = weights;
    }
  }
};

// What a thread reads of them. Column n = lane / 4 of a product belongs to a token of parity n % 2
// where the bytes of quad member n / 2 are, and is zero elsewhere, so that each thread is given the
// sums of its own codes, of two tokens.
struct TokenColumn {
  const uint32_t* first;
  const volatile uint32_t* masks;
  int step;  // to the next pair of tokens

  template <typename Weights>
  __device__ explicit TokenColumn(const Weights& weights) {
    const int lane = threadIdx.x % kWarpSize;
    const bool mine = lane / 8 == lane % 4;
    first = mine ? weights.pairs + lane / 4 % 2 * Weights::kBytes : weights.zeros;
    masks = weights.masks;
    step = mine ? Weights::kPair : 0;
  }
};

// The sums of a thread's kPositions positions for kTokensAtOnce tokens, as products leave them.
template <int kPositions>
struct TokenSums {
  int products[kPositions / 2][kTokensAtOnce / 2][4] = {};

  // sum_n c_n k_n of position i and token t.
  __device__ int sum(int i, int t) const { return product(i, t) >> kSumShift; }

  // (minus_base_score - 2 sum) / kNumBits.
  template <int kNumBits>
  __device__ float minus_score_per_bit(int i, int t, float minus_base_score) const {
    constexpr float kFactor = -2.0f / (1 << kSumShift);
    const auto product = static_cast<float>(this->product(i, t));
    if constexpr ((kNumBits & (kNumBits - 1)) == 0) {
      return __fmaf_rn(product, kFactor / kNumBits, minus_base_score / kNumBits);
    } else {
      return score_per_bit<kNumBits>(__fmaf_rn(product, kFactor, minus_base_score));
    }
  }

 private:
  __device__ int product(int i, int t) const { return products[i / 2][t / 2][i % 2 * 2 + t % 2]; }
};

// Scores every position of the units for kTokensAtOnce tokens, by a whole warp.
template <int kNumWords, int kUnits>
__device__ __forceinline__ auto sum_tokens(const CodeUnit<kNumWords> (&units)[kUnits],
                                           const TokenColumn& column, int first_token) {
  using Unit = CodeUnit<kNumWords>;
  constexpr int kPositions = kUnits * Unit::kTokens;
  TokenSums<kPositions> sums;
  // Read every time, or all masked words would be made before the loop around this and kept.
  uint32_t masks[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) masks[n] = column.masks[n];
  const uint32_t* weights = column.first + first_token / 2 * column.step;
#pragma unroll
  for (int part = 0; part < 2 * kNumWords; ++part) {  // two masks of a word
    uint4 b[kTokensAtOnce / 2];
#pragma unroll
    for (int pair = 0; pair < kTokensAtOnce / 2; ++pair) {
      b[pair] = *reinterpret_cast<const uint4*>(weights + pair * column.step + part / 2 * 16 +
                                                part % 2 * 4);
    }
#pragma unroll
    for (int i = 0; i < kPositions; i += 2) {
      const uint32_t* words =
          units[i / Unit::kTokens].words + i % Unit::kTokens * kNumWords + part / 2 * 2;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t mask = masks[part % 2 * 2 + n];
        const uint32_t a[] = {words[0] & mask, words[1] & mask, words[0] >> 4 & mask,
                              words[1] >> 4 & mask};
#pragma unroll
        for (int pair = 0; pair < kTokensAtOnce / 2; ++pair) {
          mma_m16n8k32(sums.products[i / 2][pair], a, n == 0 ? b[pair].x : b[pair].z,
                       n == 0 ? b[pair].y : b[pair].w);
        }
      }
    }
  }
  return sums;
}

}  // namespace hata
