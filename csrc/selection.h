#pragma once

#include <cstdint>
#include <limits>

// What the selection orders by and how it ends, in one place for every kernel.
namespace hata {

// Maps float16 bits to a 16-bit rank, a number with the same order; -0 equals +0 and NaN is below
// everything.
constexpr uint16_t ordered_rank_float16(uint16_t bits) {
  if ((bits & 0x7fff) > 0x7c00) return 0;
  if (bits == 0x8000) bits = 0;
  return bits & 0x8000 ? static_cast<uint16_t>(~bits) : static_cast<uint16_t>(bits | 0x8000);
}

// The same for float32 and for int32 scores.
constexpr uint32_t ordered_rank_float32(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if (bits == 0x80000000u) bits = 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr uint32_t ordered_rank_int32(int32_t score) {
  return static_cast<uint32_t>(score) ^ 0x80000000u;
}

// The ways back: bits of a score that has the rank, +0 for both zeros and a NaN for rank 0.
constexpr uint16_t float16_of_rank(uint16_t rank) {
  return static_cast<uint16_t>(rank & 0x8000 ? rank & 0x7fff : ~rank);
}
constexpr uint32_t float32_of_rank(uint32_t rank) {
  return rank & 0x80000000u ? rank & 0x7fffffffu : ~rank;
}
constexpr int32_t int32_of_rank(uint32_t rank) {
  return static_cast<int32_t>(rank ^ 0x80000000u);
}

// How many of `visible` positions are selected if there are as many: a share of them in units of
// 2^-32, rounded up, but at least min_top_k and at most top_k. The number of those that are left
// out does not fall as `visible` grows: a token leaves something out if an earlier one of its
// sequence does. A share of 0 with min_top_k = top_k is the count top_k.
constexpr int budget_of(int visible, int top_k, int min_top_k, uint32_t share) {
  const uint64_t scaled = static_cast<uint64_t>(visible) * share + 0xffffffffu;
  const int part = static_cast<int>(scaled >> 32);
  const int budget = part > min_top_k ? part : min_top_k;
  return budget < top_k ? budget : top_k;
}

// The lowest score but NaN: int32, and the bits of float16 and float32.
template <typename Score>
inline constexpr Score kLowestScore = std::numeric_limits<Score>::min();
template <>
inline constexpr uint16_t kLowestScore<uint16_t> = 0xfc00;  // -infinity
template <>
inline constexpr uint32_t kLowestScore<uint32_t> = 0xff800000;

// Where a selection says how it ended, list by list: [batch, q_len, num_kv_heads], contiguous. What
// is null is not written. Positions compete unless they are always_selected(), and where all are
// selected none does.
struct CutOutput {
  void* last_score;   // the lowest score of a selected position that competed, as scores are
  int32_t* num_ties;  // how many that competed, selected or not, have this score

  // Without ties no position that competed was selected, and the score is the lowest there is.
  template <typename Score>
  constexpr void write(int64_t list_idx, Score score, int32_t ties) const {
    if (last_score != nullptr) {
      static_cast<Score*>(last_score)[list_idx] = ties > 0 ? score : kLowestScore<Score>;
    }
    if (num_ties != nullptr) num_ties[list_idx] = ties;
  }
};

// The first num_sink and the last num_recent visible positions are always selected.
constexpr bool always_selected(int t, int visible, int num_sink, int num_recent) {
  return t < num_sink || t >= visible - num_recent;
}

}  // namespace hata
