#include "gather_attention.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "bindings/caches.h"
#include "bindings/launch.h"
#include "bindings/params.h"

namespace hata {

AttentionParams attention_params(const ArgumentChecks& check, const Tensor& q, const KvCache& cache,
                                 const PageTable& table, std::optional<double> softmax_scale,
                                 std::optional<double> softcap) {
  const DType dtype = dtype_beside(check, cache, q, "q");
  check.tensor(q, "q", scalar_type(dtype),
               {{"batch", table.batch}, {"q_len"}, {"num_heads"}, {"head_dim", cache.head_dim}});
  check.last_dims_contiguous(q, "q", 1);
  check.rows_aligned(q, "q");
  const int64_t num_heads = q.size(2);
  check.rule(
      cache.num_kv_heads > 0 && num_heads > 0 && num_heads % cache.num_kv_heads == 0, "num_heads",
      [&] { return "be a multiple of num_kv_heads=" + std::to_string(cache.num_kv_heads); },
      num_heads);
  const double scale = softmax_scale.value_or(1 / std::sqrt(cache.head_dim));
  check.rule(std::isfinite(scale), "softmax_scale", "be finite", scale);
  if (softcap) {
    check.rule(std::isfinite(*softcap) && *softcap > 0, "softcap", "be above 0 and finite",
               *softcap);
  }
  return AttentionParams{
      .table = table,
      .cache = cache,
      .dtype = dtype,
      .q_len = static_cast<int>(q.size(1)),
      .num_heads = static_cast<int>(num_heads),
      .num_splits = 1,
      .softmax_scale = static_cast<float>(scale),
      .softcap = static_cast<float>(softcap.value_or(0)),
      .q = q.data_ptr(),
      .out = nullptr,
      .lse = nullptr,
      .out_partial = nullptr,
      .lse_partial = nullptr,
      .q_batch_stride = q.stride(0),
      .q_token_stride = q.stride(1),
      .q_head_stride = q.stride(2),
  };
}

GatherAttentionParams gather_attention_params(const ArgumentChecks& check, const Tensor& q,
                                              const KvCache& cache, const PageTable& table,
                                              int64_t top_k, std::optional<double> softmax_scale,
                                              std::optional<double> softcap) {
  GatherAttentionParams params{
      attention_params(check, q, cache, table, softmax_scale, softcap),
      /*top_k=*/static_cast<int>(top_k),
      /*indices=*/nullptr,
      /*may_use_clusters=*/forced_algorithm(check) != ScoreSelectAlgorithm::kTwoKernels,
      /*queries_are_ready=*/false};
  params.num_splits = attention_num_splits(q.size(0) * q.size(1) * cache.num_kv_heads, top_k);
  return params;
}

namespace {

std::tuple<Tensor, Tensor> gather_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
    const Tensor& cache_seqlens, const Tensor& indices, std::optional<double> softmax_scale,
    std::optional<double> softcap, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
  const ArgumentChecks check("gather_attention", q, "q");
  check.rule(indices.dim() == 4, "indices", "have 4 dimensions", indices.dim());
  const KvCache cache = kv_cache(check, k_cache, v_cache, k_scale, v_scale);
  const PageTable table =
      page_table(check, block_table, cache_seqlens, k_cache.size(0), k_cache.size(1));
  GatherAttentionParams params =
      gather_attention_params(check, q, cache, table, indices.size(3), softmax_scale, softcap);
  const int64_t batch = table.batch, q_len = params.q_len, heads = params.num_heads;
  check.tensor(
      indices, "indices", ScalarType::Int,
      {{"batch", batch}, {"q_len", q_len}, {"num_kv_heads", cache.num_kv_heads}, {"top_k"}});
  check.contiguous(indices, "indices");
  Tensor out = torch::stable::new_empty(q, {batch, q_len, heads, cache.head_dim});
  Tensor lse = torch::stable::new_empty(q, {batch, q_len, heads}, ScalarType::Float);
  Tensor out_partial = torch::stable::new_empty(
      q, {params.num_splits, batch, q_len, heads, cache.head_dim}, ScalarType::Float);
  Tensor lse_partial =
      torch::stable::new_empty(q, {params.num_splits, batch, q_len, heads}, ScalarType::Float);
  params.indices = data<int32_t>(indices);
  params.out = out.data_ptr();
  params.lse = data<float>(lse);
  params.out_partial = data<float>(out_partial);
  params.lse_partial = data<float>(lse_partial);
  launch(q, params, gather_attention_cpu, gather_attention_cuda);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("gather_attention", TORCH_BOX(&gather_attention));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("gather_attention", TORCH_BOX(&gather_attention));
}

}  // namespace hata
