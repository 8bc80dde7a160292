#include "cpu/key_encoder.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dtype.h"

namespace hata {

void pack_signs(const float* values, int num_words, uint32_t* code) {
  for (int w = 0; w < num_words; ++w) {
    uint32_t word = 0;
    for (int i = 0; i < kWordBits; ++i) {
      word |= static_cast<uint32_t>(values[w * kWordBits + i] > 0.0f) << i;
    }
    code[w] = word;
  }
}

void encode_keys(const HotLoops& loops, DType dtype, int head_dim, int num_words,
                 const void* weights, const void* const* keys, int n, uint32_t* codes,
                 uint16_t* norms) {
  thread_local std::vector<float> values;
  values.resize(static_cast<size_t>(kEncodeTile) * head_dim);
  const int num_bits = num_words * kWordBits;
  float projections[kEncodeTile * kMaxWords * kWordBits];

  for (int i = 0; i < n; ++i) {
    float* row = values.data() + static_cast<int64_t>(i) * head_dim;
    loops.to_float(keys[i], dtype, head_dim, row);
    if (norms != nullptr) {
      norms[i] = float_to_float16(std::min(std::sqrt(loops.sum_squares(row, head_dim)), kMaxNorm));
    }
  }
  loops.project(values.data(), n, head_dim, weights, dtype, num_bits, projections);
  for (int i = 0; i < n; ++i)
    pack_signs(projections + i * num_bits, num_words, codes + i * num_words);
}

}  // namespace hata
