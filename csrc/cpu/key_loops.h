#pragma once

// The loops of the selection over ordered keys (selection.h), compiled once per instruction set
// (simd.h says how).

#include "cpu/hot_loops.h"
#include "cpu/simd.h"

namespace hata {
namespace {

template <class Key>
void key_range(const Key* keys, int n, Key* low, Key* high) {
  Key smallest = keys[0], largest = keys[0];
  for (int i = 1; i < n; ++i) {
    smallest = keys[i] < smallest ? keys[i] : smallest;
    largest = keys[i] > largest ? keys[i] : largest;
  }
  *low = smallest;
  *high = largest;
}

template <class Key>
void count_keys(const Key* keys, int n, Key low, Key span, int shift, int* counts) {
  // Neighbours often fall in the same bin: two histograms, so that they do not wait for each other.
  int odd[kSelectBins] = {};
  for (int bin = 0; bin < kSelectBins; ++bin) counts[bin] = 0;
  const auto count = [&](Key key, int* histogram) {
    const Key offset = static_cast<Key>(key - low);
    if (offset <= span) ++histogram[offset >> shift];
  };
  int i = 0;
  for (; i + 2 <= n; i += 2) {
    count(keys[i], counts);
    count(keys[i + 1], odd);
  }
  if (i < n) count(keys[i], counts);
  for (int bin = 0; bin < kSelectBins; ++bin) counts[bin] += odd[bin];
}

// Keys that are compared at once.
constexpr int kMaskKeys = 32;

// Bit i of the result says whether keys[i] >= cut.
#if defined(__AVX512F__)

inline uint32_t at_least(const uint16_t* keys, uint16_t cut) {
  return _mm512_cmpge_epu16_mask(_mm512_loadu_si512(keys),
                                 _mm512_set1_epi16(static_cast<int16_t>(cut)));
}
inline uint32_t at_least(const uint32_t* keys, uint32_t cut) {
  const __m512i bound = _mm512_set1_epi32(static_cast<int32_t>(cut));
  const uint32_t low = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys), bound);
  const uint32_t high = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + 16), bound);
  return low | high << 16;
}

#elif defined(__AVX2__)

inline __m256i load_keys(const void* keys) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(keys));
}
inline uint32_t at_least(const uint16_t* keys, uint16_t cut) {
  const __m256i bound = _mm256_set1_epi16(static_cast<int16_t>(cut));
  const __m256i low = load_keys(keys), high = load_keys(keys + 16);
  const __m256i hits = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(low, bound), low),
                                          _mm256_cmpeq_epi16(_mm256_max_epu16(high, bound), high));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(hits, 0xd8)));
}
inline uint32_t at_least(const uint32_t* keys, uint32_t cut) {
  const __m256i bound = _mm256_set1_epi32(static_cast<int32_t>(cut));
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    const __m256i part = load_keys(keys + i * 8);
    const __m256i hits = _mm256_cmpeq_epi32(_mm256_max_epu32(part, bound), part);
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(hits))) << (i * 8);
  }
  return mask;
}

#else

template <class Key>
inline uint32_t at_least(const Key* keys, Key cut) {
  uint32_t mask = 0;
  for (int i = 0; i < kMaskKeys; ++i) mask |= static_cast<uint32_t>(keys[i] >= cut) << i;
  return mask;
}

#endif

template <class Key>
int32_t* collect_keys(const Key* keys, int n, Key cut, int num_skipped, int first,
                      int32_t* positions) {
  const auto collect = [&](int i) {
    if (keys[i] == cut && num_skipped > 0) {
      --num_skipped;
    } else {
      *positions++ = first + i;
    }
  };
  int i = 0;
  for (; i + kMaskKeys <= n; i += kMaskKeys) {
    for (uint32_t hits = at_least(keys + i, cut); hits != 0; hits &= hits - 1) {
      collect(i + __builtin_ctz(hits));
    }
  }
  for (; i < n; ++i) {
    if (keys[i] >= cut) collect(i);
  }
  return positions;
}

template <class Key>
constexpr KeyLoops<Key> kKeyLoops = {key_range<Key>, count_keys<Key>, collect_keys<Key>};

}  // namespace
}  // namespace hata
