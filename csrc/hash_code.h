#pragma once

#include <cstdint>

struct CUstream_st;

// The packed hash code: bit i of a code is bit i % 32 of word i / 32, lowest bit first. A set bit
// stands for +1, a clear one for -1. codes[..., num_words] is contiguous.
namespace hata {

using CudaStream = ::CUstream_st*;  // cudaStream_t, for headers that host-only code includes

enum class DType { kFloat16, kBFloat16, kFloat32, kFloat8E4M3 };

inline constexpr int kWordBits = 32;
inline constexpr int kMaxWords = 8;  // 256 bits

// Norms are stored as float16; a longer key's norm saturates here instead of becoming infinite.
inline constexpr float kMaxNorm = 65504.0f;

constexpr int num_words(int num_bits) {
  return num_bits / kWordBits;
}

constexpr bool code_bit(const uint32_t* code, int i) {
  return (code[i / kWordBits] >> (i % kWordBits)) & 1u;
}

}  // namespace hata
