#include "score_select.h"

#include <cstdlib>
#include <string_view>
#include <tuple>

#include "bindings/caches.h"
#include "bindings/launch.h"
#include "bindings/params.h"
#include "query_planes.h"
#include "workspace.h"

namespace hata {

ScoreSelectAlgorithm forced_algorithm(const ArgumentChecks& check) {
  const char* name = std::getenv("HATA_SCORE_SELECT");
  const std::string_view algorithm = name == nullptr ? "auto" : name;
  if (algorithm == "two_kernels") return ScoreSelectAlgorithm::kTwoKernels;
  if (algorithm == "cluster") return ScoreSelectAlgorithm::kCluster;
  if (algorithm == "candidates") return ScoreSelectAlgorithm::kCandidates;
  if (algorithm == "grid") return ScoreSelectAlgorithm::kGrid;
  check.rule(algorithm == "auto", "environment variable HATA_SCORE_SELECT",
             "be auto, two_kernels, cluster, candidates or grid", algorithm);
  return ScoreSelectAlgorithm::kAuto;
}

ScoreSelectParams score_select_params(const ArgumentChecks& check, const CodeCache& cache,
                                      const PageTable& table, int q_len, int num_kv_heads,
                                      int weight_sum, const Budget& budget) {
  return ScoreSelectParams{
      .table = table,
      .code_cache = cache,
      .q_len = q_len,
      .num_kv_heads = num_kv_heads,
      .weight_sum = weight_sum,
      .top_k = budget.top_k,
      .min_top_k = budget.min_top_k,
      .top_k_share = budget.top_k_share,
      .num_sink = budget.num_sink,
      .num_recent = budget.num_recent,
      .planes = nullptr,
      .indices = nullptr,
      .num_selected = nullptr,
      .cut = {},
      .ranks = nullptr,
      .exchange = nullptr,
      .algorithm = forced_algorithm(check),
  };
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> score_select(
    const Tensor& planes, const Tensor& code_cache_, std::optional<Tensor> norm_cache,
    const Tensor& block_table, const Tensor& cache_seqlens, int64_t weight_sum, int64_t top_k,
    int64_t num_sink, int64_t num_recent, std::optional<double> top_k_share,
    std::optional<int64_t> min_top_k, bool return_cut) {
  const ArgumentChecks check("score_select", planes, "planes");
  const CodeCache cache = code_cache(check, code_cache_, norm_cache);
  const PageTable table =
      page_table(check, block_table, cache_seqlens, code_cache_.size(0), code_cache_.size(2));
  const Planes p = check_planes(check, planes, table.batch, cache, code_cache_.size(1), weight_sum);
  const Budget budget =
      checked_budget(check, top_k, num_sink, num_recent, top_k_share, min_top_k, table.capacity);
  ScoreSelectParams params = score_select_params(check, cache, table, p.q_len, p.num_kv_heads,
                                                 static_cast<int>(weight_sum), budget);
  const int64_t batch = table.batch, q_len = p.q_len, heads = p.num_kv_heads;
  Tensor indices =
      torch::stable::new_empty(planes, {batch, q_len, heads, budget.top_k}, ScalarType::Int);
  Tensor num_selected = torch::stable::new_empty(planes, {batch, q_len, heads}, ScalarType::Int);
  const ScalarType score_dtype = norm_cache ? ScalarType::Half : ScalarType::Int;
  const Cuts cuts = allocate_cuts(planes, batch, q_len, heads, score_dtype, return_cut);
  const int64_t rank_bytes =
      align_workspace(batch * q_len * heads * rank_list_bytes(table.capacity));
  Tensor workspace =
      torch::stable::new_empty(planes, {rank_bytes + kExchangeBytes}, ScalarType::Byte);
  params.planes = p.data;
  params.indices = data<int32_t>(indices);
  params.num_selected = data<int32_t>(num_selected);
  params.cut = cuts.params;
  params.ranks = workspace.data_ptr();
  params.exchange = data<std::byte>(workspace) + rank_bytes;
  launch(planes, params, score_select_cpu, score_select_cuda);
  return {indices, num_selected, cuts.last_score, cuts.num_ties};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("score_select", TORCH_BOX(&score_select));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("score_select", TORCH_BOX(&score_select));
}

}  // namespace hata
