#include "encode_query.h"

#include "bindings/launch.h"
#include "bindings/params.h"
#include "query_planes.h"

namespace hata {

EncodeQueryParams encode_query_params(const ArgumentChecks& check, const Tensor& q,
                                      const Tensor& query_weights, int64_t query_bits) {
  const DType dtype = check.float_dtype(q, "q");
  check.tensor(q, "q", scalar_type(dtype), {{"batch"}, {"q_len"}, {"num_heads"}, {"head_dim"}});
  check.last_dims_contiguous(q, "q", 1);
  check.rows_aligned(q, "q");
  check.head_dim(q.size(3));
  check.in_range(query_bits, "query_bits", 1, kMaxQueryBits);
  check.rule(query_weights.dim() == 3, "query_weights", "have 3 dimensions", query_weights.dim());
  const int64_t num_heads = q.size(2), num_kv_heads = query_weights.size(0);
  const int words =
      check_hash_weights(check, query_weights, "query_weights", dtype, num_kv_heads, q.size(3));
  check.rule(
      num_kv_heads > 0 && num_heads % num_kv_heads == 0, "num_heads",
      [&] { return "be a multiple of num_kv_heads=" + std::to_string(num_kv_heads); }, num_heads);
  const int64_t group_size = num_heads / num_kv_heads;
  check.in_range(group_size, "num_heads / num_kv_heads", 1, (1 << kMaxPlanes) - 1);
  return EncodeQueryParams{
      .dtype = dtype,
      .batch = static_cast<int>(q.size(0)),
      .q_len = static_cast<int>(q.size(1)),
      .num_heads = static_cast<int>(num_heads),
      .num_kv_heads = static_cast<int>(num_kv_heads),
      .head_dim = static_cast<int>(q.size(3)),
      .num_words = words,
      .query_bits = static_cast<int>(query_bits),
      .weight_sum = plane_weight_sum(static_cast<int>(query_bits), static_cast<int>(group_size)),
      .q = q.data_ptr(),
      .query_weights = query_weights.data_ptr(),
      .planes = nullptr,
      .q_batch_stride = q.stride(0),
      .q_token_stride = q.stride(1),
      .q_head_stride = q.stride(2),
  };
}

namespace {

Tensor encode_query(const Tensor& q, const Tensor& query_weights, int64_t query_bits) {
  const ArgumentChecks check("encode_query", q, "q");
  EncodeQueryParams params = encode_query_params(check, q, query_weights, query_bits);
  Tensor planes = torch::stable::new_empty(q,
                                           {params.batch, params.q_len, params.num_kv_heads,
                                            num_planes(params.weight_sum), params.num_words},
                                           ScalarType::Int);
  params.planes = data<uint32_t>(planes);
  launch(q, params, encode_query_cpu, encode_query_cuda);
  return planes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("encode_query", TORCH_BOX(&encode_query));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("encode_query", TORCH_BOX(&encode_query));
}

}  // namespace hata
