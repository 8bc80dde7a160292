#include "dense_attention.h"

#include <limits>
#include <optional>

#include "bindings/caches.h"
#include "bindings/launch.h"
#include "bindings/params.h"

namespace hata {
namespace {

void dense_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& block_table, const Tensor& cache_seqlens,
                     std::optional<double> softmax_scale, std::optional<double> softcap,
                     std::optional<int64_t> min_sparse_len, std::optional<Tensor> k_scale,
                     std::optional<Tensor> v_scale, Tensor out, Tensor lse) {
  const ArgumentChecks check("dense_attention", q, "q");
  const KvCache cache = kv_cache(check, k_cache, v_cache, k_scale, v_scale);
  const PageTable table =
      page_table(check, block_table, cache_seqlens, k_cache.size(0), k_cache.size(1));
  DenseAttentionParams params{attention_params(check, q, cache, table, softmax_scale, softcap),
                              /*min_sparse_len=*/std::numeric_limits<int>::max()};
  if (min_sparse_len) {
    check.in_range(*min_sparse_len, "min_sparse_len", 0, kMaxInt32);
    params.min_sparse_len = static_cast<int>(*min_sparse_len);
  }
  const Dim batch{"batch", table.batch}, q_len{"q_len", params.q_len};
  const Dim num_heads{"num_heads", params.num_heads}, head_dim{"head_dim", cache.head_dim};
  check.tensor(out, "out", q.scalar_type(), {batch, q_len, num_heads, head_dim});
  check.contiguous(out, "out");
  check.rows_aligned(out, "out");
  check.tensor(lse, "lse", ScalarType::Float, {batch, q_len, num_heads});
  check.contiguous(lse, "lse");
  params.num_splits = dense_num_splits(params);
  const int64_t num_parts = params.num_splits * num_queries_of(params);
  const Tensor out_partial = torch::stable::new_empty(
      q, {params.num_splits > 1 ? num_parts * cache.head_dim : 0}, ScalarType::Float);
  const Tensor lse_partial =
      torch::stable::new_empty(q, {params.num_splits > 1 ? num_parts : 0}, ScalarType::Float);
  params.out = out.data_ptr();
  params.lse = data<float>(lse);
  params.out_partial = data<float>(out_partial);
  params.lse_partial = data<float>(lse_partial);
  launch(q, params, dense_attention_cpu, dense_attention_cuda);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("dense_attention", TORCH_BOX(&dense_attention));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("dense_attention", TORCH_BOX(&dense_attention));
}

}  // namespace hata
