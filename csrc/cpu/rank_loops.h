#pragma once

// The loops of the selection over ordered ranks (selection.h), compiled once per instruction set
// (simd.h says how).

#include "cpu/hot_loops.h"
#include "cpu/simd.h"

namespace hata {
namespace {

template <class Rank>
void rank_range(const Rank* ranks, int n, Rank* low, Rank* high) {
  Rank smallest = ranks[0], largest = ranks[0];
  for (int i = 1; i < n; ++i) {
    smallest = ranks[i] < smallest ? ranks[i] : smallest;
    largest = ranks[i] > largest ? ranks[i] : largest;
  }
  *low = smallest;
  *high = largest;
}

template <class Rank>
void count_ranks(const Rank* ranks, int n, Rank low, Rank span, int shift, int* counts) {
  // Neighbours often fall in the same bin: two histograms, so that they do not wait for each other.
  int odd[kSelectBins] = {};
  for (int bin = 0; bin < kSelectBins; ++bin) counts[bin] = 0;
  const auto count = [&](Rank rank, int* histogram) {
    const Rank offset = static_cast<Rank>(rank - low);
    if (offset <= span) ++histogram[offset >> shift];
  };
  int i = 0;
  for (; i + 2 <= n; i += 2) {
    count(ranks[i], counts);
    count(ranks[i + 1], odd);
  }
  if (i < n) count(ranks[i], counts);
  for (int bin = 0; bin < kSelectBins; ++bin) counts[bin] += odd[bin];
}

// Keys that are compared at once.
constexpr int kMaskRanks = 32;

// Bit i of the result says whether ranks[i] >= cut.
#if defined(__AVX512F__)

inline uint32_t at_least(const uint16_t* ranks, uint16_t cut) {
  return _mm512_cmpge_epu16_mask(_mm512_loadu_si512(ranks),
                                 _mm512_set1_epi16(static_cast<int16_t>(cut)));
}
inline uint32_t at_least(const uint32_t* ranks, uint32_t cut) {
  const __m512i bound = _mm512_set1_epi32(static_cast<int32_t>(cut));
  const uint32_t low = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(ranks), bound);
  const uint32_t high = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(ranks + 16), bound);
  return low | high << 16;
}

#elif defined(__AVX2__)

inline __m256i load_ranks(const void* ranks) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(ranks));
}
inline uint32_t at_least(const uint16_t* ranks, uint16_t cut) {
  const __m256i bound = _mm256_set1_epi16(static_cast<int16_t>(cut));
  const __m256i low = load_ranks(ranks), high = load_ranks(ranks + 16);
  const __m256i hits = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(low, bound), low),
                                          _mm256_cmpeq_epi16(_mm256_max_epu16(high, bound), high));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(hits, 0xd8)));
}
inline uint32_t at_least(const uint32_t* ranks, uint32_t cut) {
  const __m256i bound = _mm256_set1_epi32(static_cast<int32_t>(cut));
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    const __m256i part = load_ranks(ranks + i * 8);
    const __m256i hits = _mm256_cmpeq_epi32(_mm256_max_epu32(part, bound), part);
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(hits))) << (i * 8);
  }
  return mask;
}

#else

template <class Rank>
inline uint32_t at_least(const Rank* ranks, Rank cut) {
  uint32_t mask = 0;
  for (int i = 0; i < kMaskRanks; ++i) mask |= static_cast<uint32_t>(ranks[i] >= cut) << i;
  return mask;
}

#endif

template <class Rank>
int32_t* collect_ranks(const Rank* ranks, int n, Rank cut, int num_skipped, int first,
                       int32_t* positions) {
  const auto collect = [&](int i) {
    if (ranks[i] == cut && num_skipped > 0) {
      --num_skipped;
    } else {
      *positions++ = first + i;
    }
  };
  int i = 0;
  for (; i + kMaskRanks <= n; i += kMaskRanks) {
    for (uint32_t hits = at_least(ranks + i, cut); hits != 0; hits &= hits - 1) {
      collect(i + __builtin_ctz(hits));
    }
  }
  for (; i < n; ++i) {
    if (ranks[i] >= cut) collect(i);
  }
  return positions;
}

template <class Rank>
constexpr RankLoops<Rank> kRankLoops = {rank_range<Rank>, count_ranks<Rank>, collect_ranks<Rank>};

}  // namespace
}  // namespace hata
