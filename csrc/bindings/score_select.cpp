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
  check.rule(algorithm == "auto", "environment variable HATA_SCORE_SELECT",
             "be auto, two_kernels, cluster or candidates", algorithm);
  return ScoreSelectAlgorithm::kAuto;
}

ScoreSelectParams score_select_params(const ArgumentChecks& check, const Tensor& code_cache_,
                                      const std::optional<Tensor>& norm_cache,
                                      const Tensor& block_table, const Tensor& cache_seqlens,
                                      int64_t weight_sum, int64_t q_len, int64_t top_k,
                                      int64_t num_sink, int64_t num_recent) {
  const CodeCache cache = code_cache(check, code_cache_, norm_cache);
  check_budget(check, top_k, num_sink, num_recent);
  return ScoreSelectParams{
      .table =
          page_table(check, block_table, cache_seqlens, code_cache_.size(0), code_cache_.size(2)),
      .code_cache = cache,
      .q_len = static_cast<int>(q_len),
      .num_kv_heads = static_cast<int>(code_cache_.size(1)),
      .weight_sum = static_cast<int>(weight_sum),
      .top_k = static_cast<int>(top_k),
      .num_sink = static_cast<int>(num_sink),
      .num_recent = static_cast<int>(num_recent),
      .planes = nullptr,
      .indices = nullptr,
      .num_selected = nullptr,
      .keys = nullptr,
      .algorithm = forced_algorithm(check),
  };
}

std::byte* check_workspace(const ArgumentChecks& check, const Tensor& workspace, int64_t size) {
  check.tensor(workspace, "workspace", ScalarType::Byte, {{"size"}});
  check.contiguous(workspace, "workspace");
  check.rule(workspace.numel() >= size, "workspace",
             "have at least " + std::to_string(size) + " bytes", workspace.numel());
  check.rule(reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0, "workspace",
             "start at a multiple of 16 bytes", "another offset");
  return data<std::byte>(workspace);
}

namespace {

ScoreSelectParams with_planes(const ArgumentChecks& check, const Tensor& planes,
                              const Tensor& code_cache_, const std::optional<Tensor>& norm_cache,
                              const Tensor& block_table, const Tensor& cache_seqlens,
                              int64_t weight_sum, int64_t top_k, int64_t num_sink,
                              int64_t num_recent) {
  check.rule(planes.dim() == 5, "planes", "have 5 dimensions", planes.dim());
  ScoreSelectParams params =
      score_select_params(check, code_cache_, norm_cache, block_table, cache_seqlens, weight_sum,
                          planes.size(1), top_k, num_sink, num_recent);
  params.planes = check_planes(check, planes, params.table.batch, params.code_cache,
                               params.num_kv_heads, weight_sum)
                      .data;
  return params;
}

// score_select alone needs only the keys; the rest of the layout has no influence on their offset.
WorkspaceLayout layout_of(const ScoreSelectParams& p) {
  return workspace_layout(p.table.batch, p.q_len, 0, p.num_kv_heads, 0, p.table.capacity, p.top_k);
}

void run(const Tensor& planes, ScoreSelectParams params, const Tensor& indices,
         const Tensor& num_selected, std::byte* workspace) {
  params.indices = data<int32_t>(indices);
  params.num_selected = data<int32_t>(num_selected);
  params.keys = reinterpret_cast<uint16_t*>(workspace + layout_of(params).keys);
  launch(planes, params, score_select_cpu, score_select_cuda);
}

void score_select_out(const Tensor& planes, const Tensor& code_cache_,
                      std::optional<Tensor> norm_cache, const Tensor& block_table,
                      const Tensor& cache_seqlens, int64_t weight_sum, int64_t top_k,
                      int64_t num_sink, int64_t num_recent, Tensor workspace, Tensor indices,
                      Tensor num_selected) {
  const ArgumentChecks check("score_select", planes, "planes");
  const ScoreSelectParams params =
      with_planes(check, planes, code_cache_, norm_cache, block_table, cache_seqlens, weight_sum,
                  top_k, num_sink, num_recent);
  check_selection(check, indices, num_selected, params.table.batch, params.q_len,
                  params.num_kv_heads, top_k);
  run(planes, params, indices, num_selected,
      check_workspace(check, workspace, layout_of(params).size));
}

std::tuple<Tensor, Tensor> score_select(const Tensor& planes, const Tensor& code_cache_,
                                        std::optional<Tensor> norm_cache, const Tensor& block_table,
                                        const Tensor& cache_seqlens, int64_t weight_sum,
                                        int64_t top_k, int64_t num_sink, int64_t num_recent) {
  const ArgumentChecks check("score_select", planes, "planes");
  const ScoreSelectParams params =
      with_planes(check, planes, code_cache_, norm_cache, block_table, cache_seqlens, weight_sum,
                  top_k, num_sink, num_recent);
  const int64_t batch = params.table.batch, q_len = params.q_len, heads = params.num_kv_heads;
  Tensor indices = torch::stable::new_empty(planes, {batch, q_len, heads, top_k}, ScalarType::Int);
  Tensor num_selected = torch::stable::new_empty(planes, {batch, q_len, heads}, ScalarType::Int);
  Tensor workspace = torch::stable::new_empty(planes, {layout_of(params).size}, ScalarType::Byte);
  run(planes, params, indices, num_selected, data<std::byte>(workspace));
  return {indices, num_selected};
}

int64_t workspace_size(int64_t batch, int64_t q_len, int64_t num_heads, int64_t num_kv_heads,
                       int64_t head_dim, int64_t max_seq_len, int64_t top_k) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"batch", batch},         {"q_len", q_len},
      {"num_heads", num_heads}, {"num_kv_heads", num_kv_heads},
      {"head_dim", head_dim},   {"max_seq_len", max_seq_len},
      {"top_k", top_k}};
  for (const auto& [name, size] : sizes) {
    STD_TORCH_CHECK(size >= 0 && size <= kMaxInt32, "hata::workspace_size: ", name,
                    " must be in 0..", kMaxInt32, ", got ", size);
  }
  return workspace_layout(batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len, top_k).size;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("score_select", TORCH_BOX(&score_select));
  m.impl("score_select.out", TORCH_BOX(&score_select_out));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("score_select", TORCH_BOX(&score_select));
  m.impl("score_select.out", TORCH_BOX(&score_select_out));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CompositeExplicitAutograd, m) {
  m.impl("workspace_size", TORCH_BOX(&workspace_size));
}

}  // namespace hata
