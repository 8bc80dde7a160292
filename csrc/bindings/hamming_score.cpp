#include "hamming_score.h"

#include "bindings/caches.h"
#include "bindings/launch.h"
#include "bindings/params.h"
#include "query_planes.h"

namespace hata {

Planes check_planes(const ArgumentChecks& check, const Tensor& planes, int64_t batch,
                    const CodeCache& cache, int64_t num_kv_heads, int64_t weight_sum) {
  check.in_range(weight_sum, "weight_sum", 1, (1 << kMaxPlanes) - 1);
  check.tensor(planes, "planes", ScalarType::Int,
               {{"batch", batch},
                {"q_len"},
                {"num_kv_heads", num_kv_heads},
                {"num_planes", num_planes(static_cast<int>(weight_sum))},
                {"num_words", cache.num_words}});
  check.contiguous(planes, "planes");
  return {static_cast<int>(planes.size(1)), static_cast<int>(num_kv_heads), data<uint32_t>(planes)};
}

namespace {

Tensor hamming_score(const Tensor& planes, const Tensor& code_cache_,
                     std::optional<Tensor> norm_cache, const Tensor& block_table,
                     const Tensor& cache_seqlens, int64_t weight_sum, int64_t max_seq_len) {
  const ArgumentChecks check("hamming_score", planes, "planes");
  const CodeCache cache = code_cache(check, code_cache_, norm_cache);
  const PageTable table =
      page_table(check, block_table, cache_seqlens, code_cache_.size(0), code_cache_.size(2));
  const Planes p = check_planes(check, planes, table.batch, cache, code_cache_.size(1), weight_sum);
  check.in_range(max_seq_len, "max_seq_len", 0, kMaxInt32);
  Tensor scores =
      torch::stable::new_empty(planes, {table.batch, p.q_len, p.num_kv_heads, max_seq_len},
                               norm_cache ? ScalarType::Half : ScalarType::Int);
  const HammingScoreParams params{
      .table = table,
      .code_cache = cache,
      .kind = norm_cache ? ScoreKind::kFloat16 : ScoreKind::kInt32,
      .q_len = p.q_len,
      .num_kv_heads = p.num_kv_heads,
      .weight_sum = static_cast<int>(weight_sum),
      .max_seq_len = static_cast<int>(max_seq_len),
      .planes = p.data,
      .scores = scores.data_ptr(),
  };
  launch(planes, params, hamming_score_cpu, hamming_score_cuda);
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("hamming_score", TORCH_BOX(&hamming_score));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("hamming_score", TORCH_BOX(&hamming_score));
}

}  // namespace hata
