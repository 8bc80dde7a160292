#pragma once

// The scan's loops of hot_loops.h, compiled once per instruction set (simd.h says how).

#include "cpu/hot_loops.h"
#include "cpu/simd.h"

namespace hata {
namespace {

// sum_p w_p popcount(code ^ planes[p]) of one code.
inline int weighted_distance(const ScanPlanes& planes, const uint32_t* code) {
  int distance = 0;
  for (int p = 0; p < planes.num_planes; ++p) {
    int differing = 0;
    for (int w = 0; w < planes.num_words; ++w) {
      differing += __builtin_popcount(code[w] ^ planes.planes[p][w]);
    }
    distance += planes.weights[p] * differing;
  }
  return distance;
}

void count_matches(const ScanPlanes& planes, const uint32_t* codes, int n, uint16_t* matches) {
  for (int t = 0; t < n; ++t) {
    matches[t] = static_cast<uint16_t>(planes.max_matches -
                                       weighted_distance(planes, codes + t * planes.num_words));
  }
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
