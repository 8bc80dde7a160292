#pragma once

#include <bit>

// A query token and KV head become one integer vector c, and score[t] = sum_i c_i b_i(t). The
// vector is held as bit planes with positive integer weights w_p: c_i = sum_p w_p s_p,i with s = +1
// for a set bit and -1 for a clear one. So
//
//   score[t] = sum_p w_p (num_bits - 2 popcount(code_t ^ plane_p)) = 2 matches[t] - weight_sum
//   num_bits, matches[t] = sum_p w_p (num_bits - popcount(code_t ^ plane_p)), in 0..weight_sum
//   num_bits.
//
// Every c_i has the form 2 level - weight_sum with level in 0..weight_sum, the weighted count of
// its set planes. Weights are 1, 2, 4, ... and a last one that brings their sum to weight_sum, so
// that every level can be written: group 7 has 1, 2, 4; group 4 has 1, 2, 1; 4 query bits have 1,
// 2, 4, 8.
namespace hata {

inline constexpr int kMaxQueryBits = 4;
inline constexpr int kMaxPlanes = 8;  // groups up to 255 query heads

// query_bits 1 sums the signs of the group's heads, so that |c_i| reaches the group's size.
constexpr int plane_weight_sum(int query_bits, int group_size) {
  return query_bits == 1 ? group_size : (1 << query_bits) - 1;
}

constexpr int num_planes(int weight_sum) {
  return std::bit_width(static_cast<unsigned>(weight_sum));
}

constexpr int plane_weight(int plane, int weight_sum) {
  const int last = num_planes(weight_sum) - 1;
  return plane < last ? 1 << plane : weight_sum - ((1 << last) - 1);
}

// The score of a position that matches the planes so often, of max_matches = weight_sum num_bits.
constexpr int score_of_matches(int matches, int max_matches) {
  return 2 * matches - max_matches;
}

// Bit p of the result says whether plane p is set for this level (0..weight_sum).
constexpr unsigned level_planes(int level, int weight_sum) {
  const int last = num_planes(weight_sum) - 1;
  const int last_weight = plane_weight(last, weight_sum);
  return level >= last_weight ? static_cast<unsigned>(level - last_weight) | (1u << last)
                              : static_cast<unsigned>(level);
}

}  // namespace hata
