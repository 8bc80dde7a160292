#include "select_topk.h"

#include <tuple>

#include "bindings/launch.h"
#include "bindings/params.h"

namespace hata {

void check_budget(const ArgumentChecks& check, int64_t top_k, int64_t num_sink,
                  int64_t num_recent) {
  check.in_range(top_k, "top_k", 1, kMaxInt32);
  check.in_range(num_sink, "num_sink", 0, kMaxInt32);
  check.in_range(num_recent, "num_recent", 0, kMaxInt32);
  check.rule(num_sink + num_recent <= top_k, "num_sink + num_recent",
             "be at most top_k=" + std::to_string(top_k), num_sink + num_recent);
}

void check_selection(const ArgumentChecks& check, const Tensor& indices, const Tensor& num_selected,
                     int64_t batch, int64_t q_len, int64_t num_kv_heads, int64_t top_k) {
  const Dim rows[] = {{"batch", batch}, {"q_len", q_len}, {"num_kv_heads", num_kv_heads}};
  check.tensor(indices, "indices", ScalarType::Int, {rows[0], rows[1], rows[2], {"top_k", top_k}});
  check.contiguous(indices, "indices");
  check.tensor(num_selected, "num_selected", ScalarType::Int, {rows[0], rows[1], rows[2]});
  check.contiguous(num_selected, "num_selected");
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

// `indices` and `num_selected` are left null.
SelectTopkParams select_topk_params(const ArgumentChecks& check, const Tensor& scores,
                                    const Tensor& cache_seqlens, int64_t top_k, int64_t num_sink,
                                    int64_t num_recent) {
  const SelectDType dtype = select_dtype(check, scores);
  check.tensor(scores, "scores", scores.scalar_type(),
               {{"batch"}, {"q_len"}, {"num_kv_heads"}, {"max_seq_len"}});
  check.last_dims_contiguous(scores, "scores", 1);
  check.tensor(cache_seqlens, "cache_seqlens", ScalarType::Int, {{"batch", scores.size(0)}});
  check.contiguous(cache_seqlens, "cache_seqlens");
  check_budget(check, top_k, num_sink, num_recent);
  const int32_t* seqlens = data<int32_t>(cache_seqlens);
  for (int64_t b = 0; !check.on_cuda() && b < scores.size(0); ++b) {
    check.rule(seqlens[b] >= 0 && seqlens[b] <= scores.size(3), "cache_seqlens",
               "be in 0.." + std::to_string(scores.size(3)) + " (the width of scores)",
               std::to_string(seqlens[b]) + " for sequence " + std::to_string(b));
  }
  return SelectTopkParams{
      .dtype = dtype,
      .batch = static_cast<int>(scores.size(0)),
      .q_len = static_cast<int>(scores.size(1)),
      .num_kv_heads = static_cast<int>(scores.size(2)),
      .max_seq_len = static_cast<int>(scores.size(3)),
      .top_k = static_cast<int>(top_k),
      .num_sink = static_cast<int>(num_sink),
      .num_recent = static_cast<int>(num_recent),
      .scores = scores.data_ptr(),
      .cache_seqlens = seqlens,
      .indices = nullptr,
      .num_selected = nullptr,
      .score_batch_stride = scores.stride(0),
      .score_token_stride = scores.stride(1),
      .score_head_stride = scores.stride(2),
  };
}

void run(const Tensor& scores, SelectTopkParams params, const Tensor& indices,
         const Tensor& num_selected) {
  params.indices = data<int32_t>(indices);
  params.num_selected = data<int32_t>(num_selected);
  launch(scores, params, select_topk_cpu, select_topk_cuda);
}

void select_topk_out(const Tensor& scores, const Tensor& cache_seqlens, int64_t top_k,
                     int64_t num_sink, int64_t num_recent, Tensor indices, Tensor num_selected) {
  const ArgumentChecks check("select_topk", scores, "scores");
  const SelectTopkParams params =
      select_topk_params(check, scores, cache_seqlens, top_k, num_sink, num_recent);
  check_selection(check, indices, num_selected, params.batch, params.q_len, params.num_kv_heads,
                  top_k);
  run(scores, params, indices, num_selected);
}

std::tuple<Tensor, Tensor> select_topk(const Tensor& scores, const Tensor& cache_seqlens,
                                       int64_t top_k, int64_t num_sink, int64_t num_recent) {
  const ArgumentChecks check("select_topk", scores, "scores");
  const SelectTopkParams params =
      select_topk_params(check, scores, cache_seqlens, top_k, num_sink, num_recent);
  Tensor indices = torch::stable::new_empty(
      scores, {params.batch, params.q_len, params.num_kv_heads, top_k}, ScalarType::Int);
  Tensor num_selected = torch::stable::new_empty(
      scores, {params.batch, params.q_len, params.num_kv_heads}, ScalarType::Int);
  run(scores, params, indices, num_selected);
  return {indices, num_selected};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("select_topk", TORCH_BOX(&select_topk));
  m.impl("select_topk.out", TORCH_BOX(&select_topk_out));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("select_topk", TORCH_BOX(&select_topk));
  m.impl("select_topk.out", TORCH_BOX(&select_topk_out));
}

}  // namespace hata
