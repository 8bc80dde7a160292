#include "gather_attention.h"

#include <cmath>
#include <tuple>

#include "bindings/caches.h"
#include "bindings/launch.h"
#include "bindings/params.h"
#include "workspace.h"

namespace hata {

GatherAttentionParams gather_attention_params(const ArgumentChecks& check, const Tensor& q,
                                              const Tensor& k_cache, const Tensor& v_cache,
                                              const Tensor& block_table,
                                              const Tensor& cache_seqlens, int64_t top_k,
                                              double softmax_scale) {
  const KvCache cache = kv_cache(check, k_cache, v_cache);
  const PageTable table =
      page_table(check, block_table, cache_seqlens, k_cache.size(0), k_cache.size(1));
  check.tensor(q, "q", scalar_type(cache.dtype),
               {{"batch", table.batch}, {"q_len"}, {"num_heads"}, {"head_dim", cache.head_dim}});
  check.last_dims_contiguous(q, "q", 1);
  check.rows_aligned(q, "q");
  const int64_t num_heads = q.size(2);
  check.rule(cache.num_kv_heads > 0 && num_heads > 0 && num_heads % cache.num_kv_heads == 0,
             "num_heads", "be a multiple of num_kv_heads=" + std::to_string(cache.num_kv_heads),
             num_heads);
  check.rule(std::isfinite(softmax_scale), "softmax_scale", "be finite", softmax_scale);
  return GatherAttentionParams{
      .table = table,
      .cache = cache,
      .q_len = static_cast<int>(q.size(1)),
      .num_heads = static_cast<int>(num_heads),
      .top_k = static_cast<int>(top_k),
      .num_splits =
          gather_num_splits(q.size(0) * q.size(1) * cache.num_kv_heads, static_cast<int>(top_k)),
      .softmax_scale = static_cast<float>(softmax_scale),
      .q = q.data_ptr(),
      .indices = nullptr,
      .out = nullptr,
      .lse = nullptr,
      .out_partial = nullptr,
      .lse_partial = nullptr,
      .may_use_clusters = forced_algorithm(check) != ScoreSelectAlgorithm::kTwoKernels,
      .queries_are_ready = false,
      .q_batch_stride = q.stride(0),
      .q_token_stride = q.stride(1),
      .q_head_stride = q.stride(2),
  };
}

void check_attention_out(const ArgumentChecks& check, const GatherAttentionParams& params,
                         const Tensor& out, const Tensor& lse) {
  const Dim rows[] = {
      {"batch", params.table.batch}, {"q_len", params.q_len}, {"num_heads", params.num_heads}};
  check.tensor(out, "out", scalar_type(params.cache.dtype),
               {rows[0], rows[1], rows[2], {"head_dim", params.cache.head_dim}});
  check.contiguous(out, "out");
  check.rows_aligned(out, "out");
  check.tensor(lse, "lse", ScalarType::Float, {rows[0], rows[1], rows[2]});
  check.contiguous(lse, "lse");
}

namespace {

GatherAttentionParams with_indices(const ArgumentChecks& check, const Tensor& q,
                                   const Tensor& k_cache, const Tensor& v_cache,
                                   const Tensor& block_table, const Tensor& cache_seqlens,
                                   const Tensor& indices, double softmax_scale) {
  check.rule(indices.dim() == 4, "indices", "have 4 dimensions", indices.dim());
  const int64_t top_k = indices.size(3);
  GatherAttentionParams params = gather_attention_params(check, q, k_cache, v_cache, block_table,
                                                         cache_seqlens, top_k, softmax_scale);
  check.tensor(indices, "indices", ScalarType::Int,
               {{"batch", params.table.batch},
                {"q_len", params.q_len},
                {"num_kv_heads", params.cache.num_kv_heads},
                {"top_k"}});
  check.contiguous(indices, "indices");
  params.indices = data<int32_t>(indices);
  return params;
}

WorkspaceLayout layout_of(const GatherAttentionParams& p) {
  return workspace_layout(p.table.batch, p.q_len, p.num_heads, p.cache.num_kv_heads,
                          p.cache.head_dim, /*max_seq_len=*/0, p.top_k);
}

void run(const Tensor& q, GatherAttentionParams params, const Tensor& out, const Tensor& lse,
         std::byte* workspace) {
  const WorkspaceLayout layout = layout_of(params);
  params.out = out.data_ptr();
  params.lse = data<float>(lse);
  params.out_partial = reinterpret_cast<float*>(workspace + layout.out_partial);
  params.lse_partial = reinterpret_cast<float*>(workspace + layout.lse_partial);
  launch(q, params, gather_attention_cpu, gather_attention_cuda);
}

void gather_attention_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                          const Tensor& block_table, const Tensor& cache_seqlens,
                          const Tensor& indices, double softmax_scale, Tensor workspace, Tensor out,
                          Tensor lse) {
  const ArgumentChecks check("gather_attention", q, "q");
  const GatherAttentionParams params =
      with_indices(check, q, k_cache, v_cache, block_table, cache_seqlens, indices, softmax_scale);
  check_attention_out(check, params, out, lse);
  run(q, params, out, lse, check_workspace(check, workspace, layout_of(params).size));
}

std::tuple<Tensor, Tensor> gather_attention(const Tensor& q, const Tensor& k_cache,
                                            const Tensor& v_cache, const Tensor& block_table,
                                            const Tensor& cache_seqlens, const Tensor& indices,
                                            double softmax_scale) {
  const ArgumentChecks check("gather_attention", q, "q");
  const GatherAttentionParams params =
      with_indices(check, q, k_cache, v_cache, block_table, cache_seqlens, indices, softmax_scale);
  const int64_t batch = params.table.batch, q_len = params.q_len, heads = params.num_heads;
  Tensor out = torch::stable::new_empty(q, {batch, q_len, heads, params.cache.head_dim});
  Tensor lse = torch::stable::new_empty(q, {batch, q_len, heads}, ScalarType::Float);
  Tensor workspace = torch::stable::new_empty(q, {layout_of(params).size}, ScalarType::Byte);
  run(q, params, out, lse, data<std::byte>(workspace));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("gather_attention", TORCH_BOX(&gather_attention));
  m.impl("gather_attention.out", TORCH_BOX(&gather_attention_out));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("gather_attention", TORCH_BOX(&gather_attention));
  m.impl("gather_attention.out", TORCH_BOX(&gather_attention_out));
}

}  // namespace hata
