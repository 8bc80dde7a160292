#pragma once

#include <cstdint>

// What the selection orders by, in one place for every kernel.
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

// The first num_sink and the last num_recent visible positions are always selected.
constexpr bool always_selected(int t, int visible, int num_sink, int num_recent) {
  return t < num_sink || t >= visible - num_recent;
}

}  // namespace hata
