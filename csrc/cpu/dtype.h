#pragma once

#include <bit>
#include <cstdint>

#include "hash_code.h"

// The element types as bits and as float32. Conversions round to nearest even.
namespace hata {

constexpr int dtype_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : (dtype == DType::kFloat8E4M3 ? 1 : 2);
}

// The address of element i of an array of dtype.
inline const void* element(const void* data, DType dtype, int64_t i) {
  return static_cast<const char*>(data) + i * dtype_size(dtype);
}

inline void* element(void* data, DType dtype, int64_t i) {
  return static_cast<char*>(data) + i * dtype_size(dtype);
}

constexpr float float16_to_float(uint16_t bits) {
  // The exponent moves from bias 15 to 127 by a product, which is exact and serves subnormals too.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  return std::bit_cast<float>(scaled | special | static_cast<uint32_t>(bits & 0x8000) << 16);
}

constexpr uint16_t float_to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  // Normal results: change the bias from 127 to 15, then round the 13 bits that are dropped.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

constexpr float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

constexpr uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float float8_to_float(uint8_t bits) {
  // As for float16, from bias 7.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7f) << 20;
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p120f);
  const uint32_t special = magnitude == 0x07f00000u ? 0x7f800000u : 0u;  // NaN
  return std::bit_cast<float>(scaled | special | static_cast<uint32_t>(bits & 0x80) << 24);
}

// What is larger than the largest float8, 448, becomes that.
constexpr uint8_t float_to_float8(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // As for float16: subnormal results are multiples of 2^-9, the last bit of a float32 from 2^14.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000u;
  const uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  uint32_t byte = magnitude < 0x3c800000u ? subnormal : normal;
  byte = byte > 0x7eu ? 0x7eu : byte;
  byte = magnitude > 0x7f800000u ? 0x7fu : byte;  // NaN
  return static_cast<uint8_t>(byte | (bits >> 24 & 0x80u));
}

// Writes n float32 values as dtype.
inline void store_floats(const float* values, int n, DType dtype, void* data) {
  if (dtype == DType::kFloat32) {
    for (int i = 0; i < n; ++i) static_cast<float*>(data)[i] = values[i];
  } else if (dtype == DType::kFloat16) {
    for (int i = 0; i < n; ++i) static_cast<uint16_t*>(data)[i] = float_to_float16(values[i]);
  } else if (dtype == DType::kFloat8E4M3) {
    for (int i = 0; i < n; ++i) static_cast<uint8_t*>(data)[i] = float_to_float8(values[i]);
  } else {
    for (int i = 0; i < n; ++i) static_cast<uint16_t*>(data)[i] = float_to_bfloat16(values[i]);
  }
}

}  // namespace hata
