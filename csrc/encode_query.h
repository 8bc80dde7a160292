#pragma once

#include "hash_code.h"

namespace hata {

// planes[b, j, h] are the bit planes (query_planes.h) of the integer vector c of query token j and
// KV head h:
//   query_bits 1: c_i = sum over the group's heads g of sign(q_g . W_i), sign(0) = -1;
//   2 to 4:       z_i = (sum_g q_g) . W_i,  c_i = the odd integer nearest z_i / max|z| M,
//                 M = 2^query_bits - 1; its level (c_i + M) / 2 is floor((z_i / max|z| M + M) / 2 +
//                 0.5), and all-zero z gives c = +1.
// W = query_weights[h]; sums and products in float32.
struct EncodeQueryParams {
  DType dtype;  // of q and query_weights
  int batch, q_len, num_heads, num_kv_heads, head_dim;
  int num_words;
  int query_bits;
  int weight_sum;  // plane_weight_sum(query_bits, num_heads / num_kv_heads)

  const void* q;              // [batch, q_len, num_heads, head_dim], last dimension contiguous
  const void* query_weights;  // [num_kv_heads, head_dim, num_bits], contiguous
  uint32_t* planes;           // [batch, q_len, num_kv_heads, num_planes, num_words], contiguous

  int64_t q_batch_stride, q_token_stride, q_head_stride;
};

void encode_query_cpu(const EncodeQueryParams& params);
void encode_query_cuda(const EncodeQueryParams& params, CudaStream stream);

}  // namespace hata
