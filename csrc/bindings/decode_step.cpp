#include "decode_step.h"

#include "bindings/launch.h"
#include "bindings/params.h"
#include "workspace.h"

namespace hata {
namespace {

void decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_weights,
                 const Tensor& query_weights, Tensor k_cache, Tensor v_cache, Tensor code_cache,
                 std::optional<Tensor> norm_cache, const Tensor& block_table,
                 const Tensor& cache_seqlens, int64_t query_bits, int64_t top_k, int64_t num_sink,
                 int64_t num_recent, double softmax_scale, Tensor workspace, Tensor indices,
                 Tensor num_selected, Tensor out, Tensor lse) {
  const ArgumentChecks check("decode_step", q, "q");
  check_budget(check, top_k, num_sink, num_recent);
  DecodeStepParams params{
      .append = cache_append_params(check, k, v, key_weights, k_cache, v_cache, code_cache,
                                    norm_cache, block_table, cache_seqlens, std::nullopt),
      .encode = encode_query_params(check, q, query_weights, query_bits),
      .select = {},
      .attend = gather_attention_params(check, q, k_cache, v_cache, block_table, cache_seqlens,
                                        top_k, softmax_scale),
  };
  const auto& [append, encode, _, attend] = params;
  check.tensor(k, "k", k.scalar_type(),
               {{"batch", encode.batch},
                {"q_len", encode.q_len},
                {"num_kv_heads", encode.num_kv_heads},
                {"head_dim", encode.head_dim}});
  check.rule(encode.num_words == append.code_cache.num_words, "query_weights",
             "have as many bits as key_weights", encode.num_words * kWordBits);
  check_selection(check, indices, num_selected, encode.batch, encode.q_len, encode.num_kv_heads,
                  top_k);
  check_attention_out(check, attend, out, lse);
  params.select = score_select_params(check, code_cache, norm_cache, block_table, cache_seqlens,
                                      encode.weight_sum, encode.q_len, top_k, num_sink, num_recent);
  const WorkspaceLayout layout =
      workspace_layout(encode.batch, encode.q_len, encode.num_heads, encode.num_kv_heads,
                       encode.head_dim, append.table.capacity, top_k);
  std::byte* base = check_workspace(check, workspace, layout.size);

  params.encode.planes = reinterpret_cast<uint32_t*>(base + layout.planes);
  params.select.planes = params.encode.planes;
  params.select.keys = reinterpret_cast<uint16_t*>(base + layout.keys);
  params.select.indices = data<int32_t>(indices);
  params.select.num_selected = data<int32_t>(num_selected);
  params.attend.indices = params.select.indices;
  params.attend.out = out.data_ptr();
  params.attend.lse = data<float>(lse);
  params.attend.out_partial = reinterpret_cast<float*>(base + layout.out_partial);
  params.attend.lse_partial = reinterpret_cast<float*>(base + layout.lse_partial);
  launch(q, params, decode_step_cpu, decode_step_cuda);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
}

}  // namespace hata
