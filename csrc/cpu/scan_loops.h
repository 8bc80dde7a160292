#pragma once

// The scan's loops of hot_loops.h, compiled once per instruction set (simd.h says how).

#include "cpu/hot_loops.h"
#include "cpu/simd.h"

namespace hata {
namespace {

// sum_p w_p popcount(code ^ planes[p]) of one code.
template <int kWords>
inline uint32_t weighted_distance(const ScanPlanes& planes, const uint32_t* code) {
  uint32_t distance = 0;
  for (int p = 0; p < planes.num_planes; ++p) {
    uint32_t differing = 0;
    for (int w = 0; w < kWords; ++w) {
      differing += static_cast<uint32_t>(__builtin_popcount(code[w] ^ planes.planes[p][w]));
    }
    distance += static_cast<uint32_t>(planes.weights[p]) * differing;
  }
  return distance;
}

#if defined(__AVX2__)

#if defined(__AVX512F__)

using WordVec = __m512i;

inline WordVec load_words(const uint32_t* data) {
  return _mm512_loadu_si512(data);
}
inline void store_words(uint32_t* data, WordVec value) {
  _mm512_storeu_si512(data, value);
}

// One plane's words, laid out like the codes, and its weight.
struct PlaneVec {
  WordVec words, weight;
  PlaneVec() = default;
  PlaneVec(const uint32_t* pattern, int plane_weight)
      : words(load_words(pattern)), weight(_mm512_set1_epi32(plane_weight)) {}
};

// Weighted distances of the 32-bit words of a vector.
class Distances {
 public:
  explicit Distances(WordVec words) : words_(words), sums_(_mm512_setzero_si512()) {}

  void add(const PlaneVec& plane) {
    const WordVec counts = _mm512_popcnt_epi32(_mm512_xor_si512(words_, plane.words));
    sums_ = _mm512_dpwssd_epi32(sums_, counts, plane.weight);  // counts fit 16 bits
  }

  WordVec sums() const { return sums_; }  // a 32-bit sum for each word

 private:
  WordVec words_, sums_;
};

#else

using WordVec = __m256i;

inline WordVec load_words(const uint32_t* data) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
}
inline void store_words(uint32_t* data, WordVec value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), value);
}

inline WordVec low_nibbles(WordVec words) {
  return _mm256_and_si256(words, _mm256_set1_epi8(0x0f));
}
inline WordVec high_nibbles(WordVec words) {
  return low_nibbles(_mm256_srli_epi32(words, 4));
}

struct PlaneVec {
  WordVec low, high, weight;
  PlaneVec() = default;
  PlaneVec(const uint32_t* pattern, int plane_weight)
      : low(low_nibbles(load_words(pattern))),
        high(high_nibbles(load_words(pattern))),
        weight(_mm256_set1_epi8(static_cast<char>(plane_weight))) {}
};

class Distances {
 public:
  explicit Distances(WordVec words)
      : low_(low_nibbles(words)), high_(high_nibbles(words)), sums_(_mm256_setzero_si256()) {}

  void add(const PlaneVec& plane) {
    // Popcounts of 4 bits each from a table.
    const WordVec table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const WordVec counts =
        _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_xor_si256(low_, plane.low)),
                        _mm256_shuffle_epi8(table, _mm256_xor_si256(high_, plane.high)));
    // Weights are unsigned bytes; 16 bits hold the sum over all planes, at most 255 * 16.
    sums_ = _mm256_add_epi16(sums_, _mm256_maddubs_epi16(plane.weight, counts));
  }

  WordVec sums() const { return _mm256_madd_epi16(sums_, _mm256_set1_epi16(1)); }

 private:
  WordVec low_, high_, sums_;
};

#endif

// Codes are read as vectors of words, whatever token a word belongs to: kWords vectors hold as many
// tokens as one vector holds words. Planes are laid out to fit, and the distances of a token's
// words are summed at the end.
template <int kWords>
void count_matches_of(const ScanPlanes& planes, const uint32_t* codes, int n, uint16_t* matches) {
  constexpr int kPatterns = kLanes % kWords == 0 ? 1 : kWords;
  constexpr int kTokens = 4 * kLanes;  // tokens of a step
  constexpr int kVecs = 4 * kWords;
  PlaneVec plane_vecs[kMaxPlanes][kPatterns];
  for (int p = 0; p < planes.num_planes; ++p) {
    uint32_t pattern[kPatterns * kLanes];
    for (int i = 0; i < kPatterns * kLanes; ++i) pattern[i] = planes.planes[p][i % kWords];
    for (int i = 0; i < kPatterns; ++i) {
      plane_vecs[p][i] = PlaneVec(pattern + i * kLanes, planes.weights[p]);
    }
  }

  const uint32_t max_matches = static_cast<uint32_t>(planes.max_matches);
  int t = 0;
  for (; t + kTokens <= n; t += kTokens) {
    uint32_t sums[kTokens * kWords];
    for (int v = 0; v < kVecs; ++v) {
      Distances distances(load_words(codes + static_cast<int64_t>(t) * kWords + v * kLanes));
      for (int p = 0; p < planes.num_planes; ++p) {
        distances.add(plane_vecs[p][v % kPatterns]);
      }
      store_words(sums + v * kLanes, distances.sums());
    }
    for (int i = 0; i < kTokens; ++i) {
      uint32_t distance = 0;
      for (int w = 0; w < kWords; ++w) distance += sums[i * kWords + w];
      matches[t + i] = static_cast<uint16_t>(max_matches - distance);
    }
  }
  for (; t < n; ++t) {
    matches[t] = static_cast<uint16_t>(
        max_matches - weighted_distance<kWords>(planes, codes + static_cast<int64_t>(t) * kWords));
  }
}

#else

template <int kWords>
void count_matches_of(const ScanPlanes& planes, const uint32_t* codes, int n, uint16_t* matches) {
  const uint32_t max_matches = static_cast<uint32_t>(planes.max_matches);
  for (int t = 0; t < n; ++t) {
    matches[t] = static_cast<uint16_t>(
        max_matches - weighted_distance<kWords>(planes, codes + static_cast<int64_t>(t) * kWords));
  }
}

#endif

void count_matches(const ScanPlanes& planes, const uint32_t* codes, int n, uint16_t* matches) {
  using CountMatches = void (*)(const ScanPlanes&, const uint32_t*, int, uint16_t*);
  static constexpr CountMatches kByWords[kMaxWords] = {
      count_matches_of<1>, count_matches_of<2>, count_matches_of<3>, count_matches_of<4>,
      count_matches_of<5>, count_matches_of<6>, count_matches_of<7>, count_matches_of<8>};
  kByWords[planes.num_words - 1](planes, codes, n, matches);
}

void apply_norms(const ScanPlanes& planes, const uint16_t* matches, const uint16_t* norms, int n,
                 uint16_t* scores) {
  const FloatVec max_matches = broadcast(static_cast<float>(planes.max_matches));
  const FloatVec num_bits = broadcast(static_cast<float>(planes.num_words * kWordBits));
  const Float16* norm_values = reinterpret_cast<const Float16*>(norms);
  Float16* out = reinterpret_cast<Float16*>(scores);
  for (int t = 0; t < n; t += kLanes) {
    const FloatVec count = load_until(matches, t, n);
    const FloatVec score = count + count - max_matches;  // exact: integers below 2^24
    store_until(out, t, n, score / num_bits * load_until(norm_values, t, n));
  }
}

}  // namespace
}  // namespace hata
