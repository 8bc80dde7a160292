#pragma once

#include "hash_code.h"

namespace hata {

// bit i of codes[b, h, s] = (keys[b, s, h] . key_weights[h, :, i] > 0), products accumulated in
// float32; norms[b, h, s] = |keys[b, s, h]| computed in float32, rounded to float16.
// Strides are in elements; last dimensions are contiguous.
struct HashEncodeParams {
  DType dtype;  // of keys and key_weights; float32 on CPU only
  int batch, seq_len, num_kv_heads, head_dim;
  int num_words;  // num_bits / 32

  const void* keys;         // [batch, seq_len, num_kv_heads, head_dim]
  const void* key_weights;  // [num_kv_heads, head_dim, num_bits], contiguous
  uint32_t* codes;          // [batch, num_kv_heads, seq_len, num_words], contiguous
  uint16_t* norms;          // [batch, num_kv_heads, seq_len] float16 bits, contiguous; or null

  int64_t key_batch_stride, key_seq_stride, key_head_stride;
};

void hash_encode_cpu(const HashEncodeParams& params);
void hash_encode_cuda(const HashEncodeParams& params, CudaStream stream);

}  // namespace hata
