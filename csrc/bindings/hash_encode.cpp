#include "hash_encode.h"

#include <optional>
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

// `codes` and `norms` are left null.
HashEncodeParams hash_encode_params(const ArgumentChecks& check, const Tensor& keys,
                                    const Tensor& key_weights) {
  const DType dtype = check.float_dtype(keys, "keys");
  check.tensor(keys, "keys", scalar_type(dtype),
               {{"batch"}, {"seq_len"}, {"num_kv_heads"}, {"head_dim"}});
  check.last_dims_contiguous(keys, "keys", 1);
  check.rows_aligned(keys, "keys");
  check.head_dim(keys.size(3));
  return HashEncodeParams{
      .dtype = dtype,
      .batch = static_cast<int>(keys.size(0)),
      .seq_len = static_cast<int>(keys.size(1)),
      .num_kv_heads = static_cast<int>(keys.size(2)),
      .head_dim = static_cast<int>(keys.size(3)),
      .num_words =
          check_hash_weights(check, key_weights, "key_weights", dtype, keys.size(2), keys.size(3)),
      .keys = keys.data_ptr(),
      .key_weights = key_weights.data_ptr(),
      .codes = nullptr,
      .norms = nullptr,
      .key_batch_stride = keys.stride(0),
      .key_seq_stride = keys.stride(1),
      .key_head_stride = keys.stride(2),
  };
}

void hash_encode_out(const Tensor& keys, const Tensor& key_weights, Tensor codes,
                     std::optional<Tensor> norms) {
  const ArgumentChecks check("hash_encode", keys, "keys");
  HashEncodeParams params = hash_encode_params(check, keys, key_weights);
  check.tensor(codes, "codes", ScalarType::Int,
               {{"batch", params.batch},
                {"num_kv_heads", params.num_kv_heads},
                {"seq_len", params.seq_len},
                {"num_words", params.num_words}});
  check.contiguous(codes, "codes");
  params.codes = data<uint32_t>(codes);
  if (norms) {
    check.tensor(*norms, "norms", ScalarType::Half,
                 {{"batch", params.batch},
                  {"num_kv_heads", params.num_kv_heads},
                  {"seq_len", params.seq_len}});
    check.contiguous(*norms, "norms");
    params.norms = data<uint16_t>(*norms);
  }
  launch(keys, params, hash_encode_cpu, hash_encode_cuda);
}

std::tuple<Tensor, Tensor> hash_encode(const Tensor& keys, const Tensor& key_weights,
                                       bool key_norms) {
  const ArgumentChecks check("hash_encode", keys, "keys");
  HashEncodeParams params = hash_encode_params(check, keys, key_weights);
  Tensor codes = torch::stable::new_empty(
      keys, {params.batch, params.num_kv_heads, params.seq_len, params.num_words}, ScalarType::Int);
  // Without key norms an empty tensor stands in their place.
  const int64_t norm_len = key_norms ? params.seq_len : 0;
  Tensor norms = torch::stable::new_empty(keys, {params.batch, params.num_kv_heads, norm_len},
                                          ScalarType::Half);
  params.codes = data<uint32_t>(codes);
  if (key_norms) params.norms = data<uint16_t>(norms);
  launch(keys, params, hash_encode_cpu, hash_encode_cuda);
  return {codes, norms};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("hash_encode", TORCH_BOX(&hash_encode));
  m.impl("hash_encode.out", TORCH_BOX(&hash_encode_out));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("hash_encode", TORCH_BOX(&hash_encode));
  m.impl("hash_encode.out", TORCH_BOX(&hash_encode_out));
}

}  // namespace hata
