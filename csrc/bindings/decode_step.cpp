#include "decode_step.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "bindings/launch.h"
#include "bindings/params.h"
#include "workspace.h"

namespace hata {
namespace {

// The start of a workspace of at least `size` bytes.
std::byte* check_workspace(const ArgumentChecks& check, const Tensor& workspace, int64_t size) {
  check.tensor(workspace, "workspace", ScalarType::Byte, {{"size"}});
  check.contiguous(workspace, "workspace");
  check.rule(
      workspace.numel() >= size, "workspace",
      [&] { return "have at least " + std::to_string(size) + " bytes"; }, workspace.numel());
  check.rule(reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0, "workspace",
             "start at a multiple of 16 bytes", "another offset");
  return data<std::byte>(workspace);
}

void decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_weights,
                 const Tensor& query_weights, Tensor k_cache, Tensor v_cache, Tensor code_cache,
                 std::optional<Tensor> norm_cache, const Tensor& block_table,
                 const Tensor& cache_seqlens, int64_t query_bits, int64_t top_k, int64_t num_sink,
                 int64_t num_recent, std::optional<double> top_k_share,
                 std::optional<int64_t> min_top_k, std::optional<double> softmax_scale,
                 std::optional<double> softcap, std::optional<Tensor> k_scale,
                 std::optional<Tensor> v_scale, std::optional<Tensor> workspace,
                 std::optional<Tensor> last_score, std::optional<Tensor> num_ties, Tensor indices,
                 Tensor num_selected, Tensor out, Tensor lse) {
  const ArgumentChecks check("decode_step", q, "q");
  DecodeStepParams params{};
  auto& [append, encode, select, attend] = params;
  append = cache_append_params(check, k, v, key_weights, k_cache, v_cache, code_cache, norm_cache,
                               block_table, cache_seqlens, std::nullopt, k_scale, v_scale);
  check.dtype_and_device(q, "q", k.scalar_type());
  const int capacity = append.table.capacity;
  const Budget budget =
      checked_budget(check, top_k, num_sink, num_recent, top_k_share, min_top_k, capacity);
  attend = gather_attention_params(check, q, append.cache, append.table, budget.top_k,
                                   softmax_scale, softcap);
  encode = encode_query_params(check, q, query_weights, query_bits);
  check.tensor(k, "k", k.scalar_type(),
               {{"batch", encode.batch},
                {"q_len", encode.q_len},
                {"num_kv_heads", encode.num_kv_heads},
                {"head_dim", encode.head_dim}});
  check.rule(encode.num_words == append.code_cache.num_words, "query_weights",
             "have as many bits as key_weights", encode.num_words * kWordBits);
  select = score_select_params(check, append.code_cache, append.table, encode.q_len,
                               encode.num_kv_heads, encode.weight_sum, budget);

  const Dim batch{"batch", encode.batch}, q_len{"q_len", encode.q_len};
  const Dim num_heads{"num_heads", encode.num_heads};
  const Dim num_kv_heads{"num_kv_heads", encode.num_kv_heads};
  check.tensor(indices, "indices", ScalarType::Int,
               {batch, q_len, num_kv_heads, {"min(top_k, capacity)", budget.top_k}});
  check.contiguous(indices, "indices");
  check.tensor(num_selected, "num_selected", ScalarType::Int, {batch, q_len, num_kv_heads});
  check.contiguous(num_selected, "num_selected");
  check.tensor(out, "out", q.scalar_type(),
               {batch, q_len, num_heads, {"head_dim", encode.head_dim}});
  check.contiguous(out, "out");
  check.rows_aligned(out, "out");
  check.tensor(lse, "lse", ScalarType::Float, {batch, q_len, num_heads});
  check.contiguous(lse, "lse");
  if (last_score) {
    const ScalarType score_dtype = norm_cache ? ScalarType::Half : ScalarType::Int;
    check.tensor(*last_score, "last_score", score_dtype, {batch, q_len, num_kv_heads});
    check.contiguous(*last_score, "last_score");
  }
  if (num_ties) {
    check.tensor(*num_ties, "num_ties", ScalarType::Int, {batch, q_len, num_kv_heads});
    check.contiguous(*num_ties, "num_ties");
  }
  const WorkspaceLayout layout =
      workspace_layout(encode.batch, encode.q_len, encode.num_heads, encode.num_kv_heads,
                       encode.head_dim, capacity, budget.top_k);
  if (!workspace) workspace = torch::stable::new_empty(q, {layout.size}, ScalarType::Byte);
  std::byte* base = check_workspace(check, *workspace, layout.size);

  encode.planes = reinterpret_cast<uint32_t*>(base + layout.planes);
  select.planes = encode.planes;
  select.ranks = base + layout.ranks;
  select.exchange = base + layout.exchange;
  select.indices = data<int32_t>(indices);
  select.num_selected = data<int32_t>(num_selected);
  select.cut = {last_score ? last_score->data_ptr() : nullptr,
                num_ties ? data<int32_t>(*num_ties) : nullptr};
  attend.indices = select.indices;
  attend.out = out.data_ptr();
  attend.lse = data<float>(lse);
  attend.out_partial = reinterpret_cast<float*>(base + layout.out_partial);
  attend.lse_partial = reinterpret_cast<float*>(base + layout.lse_partial);
  launch(q, params, decode_step_cpu, decode_step_cuda);
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
  return workspace_layout(batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len,
                          std::min(top_k, max_seq_len))
      .size;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CompositeExplicitAutograd, m) {
  m.impl("workspace_size", TORCH_BOX(&workspace_size));
}

}  // namespace hata
