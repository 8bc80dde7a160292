#include "select_topk.h"

#include <algorithm>
#include <tuple>

#include "bindings/launch.h"
#include "bindings/params.h"

namespace hata {

Budget checked_budget(const ArgumentChecks& check, int64_t top_k, int64_t num_sink,
                      int64_t num_recent, std::optional<double> top_k_share,
                      std::optional<int64_t> min_top_k, int64_t capacity) {
  check.in_range(top_k, "top_k", 1, kMaxInt32);
  check.in_range(num_sink, "num_sink", 0, kMaxInt32);
  check.in_range(num_recent, "num_recent", 0, kMaxInt32);
  int64_t least = top_k;
  uint32_t share = 0;
  if (top_k_share) {
    check.rule(*top_k_share > 0 && *top_k_share < 1, "top_k_share", "be above 0 and below 1",
               *top_k_share);
    share = static_cast<uint32_t>(*top_k_share * 0x1p32);
    least = min_top_k.value_or(std::max(int64_t{1}, num_sink + num_recent));
    check.in_range(least, "min_top_k", 1, top_k);
  }
  check.rule(top_k_share || !min_top_k, "min_top_k", "come with top_k_share",
             min_top_k.value_or(0));
  const auto at_most = [&] {
    return std::string("be at most ") + (top_k_share ? "min_top_k=" : "top_k=") +
           std::to_string(least);
  };
  check.rule(num_sink + num_recent <= least, "num_sink + num_recent", at_most,
             num_sink + num_recent);
  // Where this cuts anything, all positions are selected, so that no other choice is left.
  const int64_t selected = std::min(top_k, capacity), sink = std::min(num_sink, selected);
  return {.top_k = static_cast<int>(selected),
          .min_top_k = static_cast<int>(std::min(least, selected)),
          .top_k_share = share,
          .num_sink = static_cast<int>(sink),
          .num_recent = static_cast<int>(std::min(num_recent, selected - sink))};
}

Cuts allocate_cuts(const Tensor& like, int64_t batch, int64_t q_len, int64_t num_kv_heads,
                   ScalarType dtype, bool return_cut) {
  const auto allocate = [&](ScalarType type) {
    return torch::stable::new_empty(like, {batch, q_len, return_cut ? num_kv_heads : 0}, type);
  };
  Cuts cuts{allocate(dtype), allocate(ScalarType::Int), {}};
  if (return_cut) cuts.params = {cuts.last_score.data_ptr(), data<int32_t>(cuts.num_ties)};
  return cuts;
}

namespace {

SelectDType select_dtype(const ArgumentChecks& check, const Tensor& scores) {
  switch (scores.scalar_type()) {
    case ScalarType::Int:
      return SelectDType::kInt32;
    case ScalarType::Half:
      return SelectDType::kFloat16;
    default:
      check.rule(scores.scalar_type() == ScalarType::Float, "scores", "be Int, Half or Float",
                 torch::headeronly::toString(scores.scalar_type()));
      return SelectDType::kFloat32;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_topk(const Tensor& scores,
                                                       const Tensor& cache_seqlens, int64_t top_k,
                                                       int64_t num_sink, int64_t num_recent,
                                                       std::optional<double> top_k_share,
                                                       std::optional<int64_t> min_top_k,
                                                       bool return_cut) {
  const ArgumentChecks check("select_topk", scores, "scores");
  const SelectDType dtype = select_dtype(check, scores);
  check.tensor(scores, "scores", scores.scalar_type(),
               {{"batch"}, {"q_len"}, {"num_kv_heads"}, {"max_seq_len"}});
  check.last_dims_contiguous(scores, "scores", 1);
  const int64_t batch = scores.size(0), q_len = scores.size(1), num_kv_heads = scores.size(2);
  const int64_t max_seq_len = scores.size(3);
  check.tensor(cache_seqlens, "cache_seqlens", ScalarType::Int, {{"batch", batch}});
  check.contiguous(cache_seqlens, "cache_seqlens");
  const Budget budget =
      checked_budget(check, top_k, num_sink, num_recent, top_k_share, min_top_k, max_seq_len);
  const int32_t* seqlens = data<int32_t>(cache_seqlens);
  for (int64_t b = 0; !check.on_cuda() && b < batch; ++b) {
    check.rule(
        seqlens[b] >= 0 && seqlens[b] <= max_seq_len, "cache_seqlens",
        [&] { return "be in 0.." + std::to_string(max_seq_len) + " (the width of scores)"; },
        [&] { return std::to_string(seqlens[b]) + " for sequence " + std::to_string(b); });
  }
  Tensor indices =
      torch::stable::new_empty(scores, {batch, q_len, num_kv_heads, budget.top_k}, ScalarType::Int);
  Tensor num_selected =
      torch::stable::new_empty(scores, {batch, q_len, num_kv_heads}, ScalarType::Int);
  const Cuts cuts =
      allocate_cuts(scores, batch, q_len, num_kv_heads, scores.scalar_type(), return_cut);
  Tensor workspace = torch::stable::new_empty(scores, {check.on_cuda() ? kSelectWorkspaceBytes : 0},
                                              ScalarType::Byte);
  const SelectTopkParams params{
      .dtype = dtype,
      .max_matches = 0,
      .batch = static_cast<int>(batch),
      .q_len = static_cast<int>(q_len),
      .num_kv_heads = static_cast<int>(num_kv_heads),
      .max_seq_len = static_cast<int>(max_seq_len),
      .top_k = budget.top_k,
      .min_top_k = budget.min_top_k,
      .top_k_share = budget.top_k_share,
      .num_sink = budget.num_sink,
      .num_recent = budget.num_recent,
      .scores = scores.data_ptr(),
      .cache_seqlens = seqlens,
      .indices = data<int32_t>(indices),
      .num_selected = data<int32_t>(num_selected),
      .cut = cuts.params,
      .workspace = static_cast<SelectCounts*>(workspace.data_ptr()),
      .score_batch_stride = scores.stride(0),
      .score_token_stride = scores.stride(1),
      .score_head_stride = scores.stride(2),
  };
  launch(scores, params, select_topk_cpu, select_topk_cuda);
  return {indices, num_selected, cuts.last_score, cuts.num_ties};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("select_topk", TORCH_BOX(&select_topk));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("select_topk", TORCH_BOX(&select_topk));
}

}  // namespace hata
