#include "hash_encode.h"

#include <tuple>

#include "bindings/launch.h"
#include "bindings/params.h"

namespace hata {

int check_hash_weights(const ArgumentChecks& check, const Tensor& weights, const char* name,
                       DType dtype, int64_t num_kv_heads, int64_t head_dim) {
  check.tensor(weights, name, scalar_type(dtype),
               {{"num_kv_heads", num_kv_heads}, {"head_dim", head_dim}, {"num_bits"}});
  check.contiguous(weights, name);
  check.rows_aligned(weights, name);
  const int64_t num_bits = weights.size(2);
  check.rule(num_bits > 0 && num_bits % kWordBits == 0 && num_bits <= kMaxWords * kWordBits,
             "num_bits", "be a multiple of 32 in 32..256", num_bits);
  return num_words(static_cast<int>(num_bits));
}

namespace {

std::tuple<Tensor, Tensor> hash_encode(const Tensor& keys, const Tensor& key_weights,
                                       bool key_norms) {
  const ArgumentChecks check("hash_encode", keys, "keys");
  const DType dtype = check.float_dtype(keys, "keys");
  check.tensor(keys, "keys", scalar_type(dtype),
               {{"batch"}, {"seq_len"}, {"num_kv_heads"}, {"head_dim"}});
  check.last_dims_contiguous(keys, "keys", 1);
  check.rows_aligned(keys, "keys");
  check.head_dim(keys.size(3));
  const int64_t batch = keys.size(0), seq_len = keys.size(1), num_kv_heads = keys.size(2);
  const int64_t head_dim = keys.size(3);
  const int words =
      check_hash_weights(check, key_weights, "key_weights", dtype, num_kv_heads, head_dim);
  Tensor codes =
      torch::stable::new_empty(keys, {batch, num_kv_heads, seq_len, words}, ScalarType::Int);
  // Without key norms an empty tensor stands in their place.
  Tensor norms = torch::stable::new_empty(keys, {batch, num_kv_heads, key_norms ? seq_len : 0},
                                          ScalarType::Half);
  const HashEncodeParams params{
      .dtype = dtype,
      .batch = static_cast<int>(batch),
      .seq_len = static_cast<int>(seq_len),
      .num_kv_heads = static_cast<int>(num_kv_heads),
      .head_dim = static_cast<int>(head_dim),
      .num_words = words,
      .keys = keys.data_ptr(),
      .key_weights = key_weights.data_ptr(),
      .codes = data<uint32_t>(codes),
      .norms = key_norms ? data<uint16_t>(norms) : nullptr,
      .key_batch_stride = keys.stride(0),
      .key_seq_stride = keys.stride(1),
      .key_head_stride = keys.stride(2),
  };
  launch(keys, params, hash_encode_cpu, hash_encode_cuda);
  return {codes, norms};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("hash_encode", TORCH_BOX(&hash_encode));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("hash_encode", TORCH_BOX(&hash_encode));
}

}  // namespace hata
