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

// The first num_sink and the last num_recent visible positions are always selected.
constexpr bool always_selected(int t, int visible, int num_sink, int num_recent) {
  return t < num_sink || t >= visible - num_recent;
}

}  // namespace hata
