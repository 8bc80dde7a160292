#pragma once

// A vector of float32 in the instruction set that this file is compiled for. Included only by the
// loops that are compiled once per instruction set. Everything there has internal linkage and,
// beyond the portable build, calls no inline function of another header: the linker keeps one copy
// of such a function, perhaps one with instructions that the CPU at hand does not have.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#else
#include "cpu/dtype.h"
#endif

namespace hata {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};

#if defined(__AVX512F__)

using FloatVec = __m512;
constexpr int kLanes = 16;
constexpr int kRegisterRows = 8;  // rows and vectors of a row that a loop keeps in registers
constexpr int kRegisterVecs = 4;

inline FloatVec broadcast(float value) {
  return _mm512_set1_ps(value);
}
inline FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline FloatVec load(const float* data) {
  return _mm512_loadu_ps(data);
}
inline FloatVec load(const Float16* data) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
}
inline FloatVec load(const BFloat16* data) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// A float8 with its bits where a float16 has those of the same meaning is 2^-8 times as large; all
// bits of its magnitude set are NaN.
inline FloatVec load(const Float8* data) {
  const __m256i bits =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(bits, magnitude), 8);
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(half, nan)), broadcast(256.0f));
}
inline FloatVec load(const uint16_t* integers) {
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(integers));
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(values));
}
inline void store(float* data, FloatVec value) {
  _mm512_storeu_ps(data, value);
}
inline void store(Float16* data, FloatVec value) {
  const __m256i bits = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), bits);
}

#elif defined(__AVX2__)

using FloatVec = __m256;
constexpr int kLanes = 8;
constexpr int kRegisterRows = 2;
constexpr int kRegisterVecs = 2;

inline FloatVec broadcast(float value) {
  return _mm256_set1_ps(value);
}
inline FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline FloatVec load(const float* data) {
  return _mm256_loadu_ps(data);
}
inline FloatVec load(const Float16* data) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}
inline FloatVec load(const BFloat16* data) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
// A float8 with its bits where a float16 has those of the same meaning is 2^-8 times as large; all
// bits of its magnitude set are NaN.
inline FloatVec load(const Float8* data) {
  const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data)));
  const __m128i magnitude = _mm_and_si128(bits, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_xor_si128(bits, magnitude), 8);
  const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
  const __m128i half = _mm_or_si128(_mm_slli_epi16(magnitude, 7), sign);
  return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, nan)), broadcast(256.0f));
}
inline FloatVec load(const uint16_t* integers) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(integers));
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(values));
}
inline void store(float* data, FloatVec value) {
  _mm256_storeu_ps(data, value);
}
inline void store(Float16* data, FloatVec value) {
  const __m128i bits = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(data), bits);
}

#else

using FloatVec = float __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kRegisterRows = 1;
constexpr int kRegisterVecs = 2;

inline FloatVec broadcast(float value) {
  return FloatVec{value, value, value, value};
}
inline FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec c) {
  return a * b + c;
}
inline FloatVec load(const float* data) {
  return FloatVec{data[0], data[1], data[2], data[3]};
}
inline FloatVec load(const Float16* data) {
  return FloatVec{float16_to_float(data[0].bits), float16_to_float(data[1].bits),
                  float16_to_float(data[2].bits), float16_to_float(data[3].bits)};
}
inline FloatVec load(const BFloat16* data) {
  return FloatVec{bfloat16_to_float(data[0].bits), bfloat16_to_float(data[1].bits),
                  bfloat16_to_float(data[2].bits), bfloat16_to_float(data[3].bits)};
}
inline FloatVec load(const Float8* data) {
  return FloatVec{float8_to_float(data[0].bits), float8_to_float(data[1].bits),
                  float8_to_float(data[2].bits), float8_to_float(data[3].bits)};
}
inline FloatVec load(const uint16_t* integers) {
  return FloatVec{static_cast<float>(integers[0]), static_cast<float>(integers[1]),
                  static_cast<float>(integers[2]), static_cast<float>(integers[3])};
}
inline void store(float* data, FloatVec value) {
  std::memcpy(data, &value, sizeof(value));
}
inline void store(Float16* data, FloatVec value) {
  for (int i = 0; i < kLanes; ++i) data[i].bits = float_to_float16(value[i]);
}

#endif

// The first n < kLanes elements, then zeros.
template <class T>
inline FloatVec load_first(const T* data, int n) {
  T padded[kLanes] = {};
  std::memcpy(padded, data, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_first(T* data, FloatVec value, int n) {
  T lanes[kLanes];
  store(lanes, value);
  std::memcpy(data, lanes, static_cast<size_t>(n) * sizeof(T));
}

// The vector at data + i, with zeros from element n on.
template <class T>
inline FloatVec load_until(const T* data, int i, int n) {
  return i + kLanes <= n ? load(data + i) : load_first(data + i, n - i);
}

template <class T>
inline void store_until(T* data, int i, int n, FloatVec value) {
  if (i + kLanes <= n) {
    store(data + i, value);
  } else {
    store_first(data + i, value, n - i);
  }
}

inline float sum_lanes(FloatVec value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// sums[i] = sum_lanes(values[i]), all four at once.
inline void sum_lanes4(const FloatVec* values, float* sums) {
#if defined(__AVX2__)
  __m128 quarters[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    const __m256 half = _mm256_add_ps(
        _mm512_castps512_ps256(values[i]),
        _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(values[i]), 1)));
#else
    const __m256 half = values[i];
#endif
    quarters[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  _MM_TRANSPOSE4_PS(quarters[0], quarters[1], quarters[2], quarters[3]);
  _mm_storeu_ps(
      sums, _mm_add_ps(_mm_add_ps(quarters[0], quarters[2]), _mm_add_ps(quarters[1], quarters[3])));
#else
  for (int i = 0; i < 4; ++i) sums[i] = sum_lanes(values[i]);
#endif
}

}  // namespace
}  // namespace hata
