#include "hash_encode.h"

#include "cuda/encode_keys.h"

namespace hata {

void hash_encode_cuda(const HashEncodeParams& p, CudaStream stream) {
  const int64_t head_norms = p.seq_len, head_codes = head_norms * p.num_words;
  CacheAppendParams params{};
  params.table.batch = p.batch;
  params.cache.num_kv_heads = p.num_kv_heads;
  params.cache.head_dim = p.head_dim;
  params.code_cache = {
      .num_words = p.num_words,
      .codes = p.codes,
      .norms = p.norms,
      .code_page_stride = p.num_kv_heads * head_codes,
      .code_head_stride = head_codes,
      .norm_page_stride = p.num_kv_heads * head_norms,
      .norm_head_stride = head_norms,
  };
  params.dtype = p.dtype;
  params.q_len = p.seq_len;
  params.k = p.keys;
  params.key_weights = p.key_weights;
  params.k_batch_stride = p.key_batch_stride;
  params.k_token_stride = p.key_seq_stride;
  params.k_head_stride = p.key_head_stride;
  encode_keys(params, "hata::hash_encode", stream);
}

}  // namespace hata
