#include "merge_attention_states.h"

#include <tuple>

#include "bindings/checks.h"
#include "bindings/launch.h"

namespace hata {
namespace {

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& out_a, const Tensor& lse_a,
                                                  const Tensor& out_b, const Tensor& lse_b) {
  const ArgumentChecks check("merge_attention_states", out_a, "out_a");
  const DType dtype = out_a.scalar_type() == ScalarType::Float ? DType::kFloat32
                                                               : check.float_dtype(out_a, "out_a");
  check.tensor(out_a, "out_a", scalar_type(dtype),
               {{"batch"}, {"q_len"}, {"num_heads"}, {"head_dim"}});
  const Dim rows[] = {
      {"batch", out_a.size(0)}, {"q_len", out_a.size(1)}, {"num_heads", out_a.size(2)}};
  check.tensor(out_b, "out_b", scalar_type(dtype),
               {rows[0], rows[1], rows[2], {"head_dim", out_a.size(3)}});
  check.tensor(lse_a, "lse_a", ScalarType::Float, {rows[0], rows[1], rows[2]});
  check.tensor(lse_b, "lse_b", ScalarType::Float, {rows[0], rows[1], rows[2]});
  for (const auto& [t, name] : {std::pair{&out_a, "out_a"}, std::pair{&lse_a, "lse_a"},
                                std::pair{&out_b, "out_b"}, std::pair{&lse_b, "lse_b"}}) {
    check.contiguous(*t, name);
  }
  Tensor out = torch::stable::new_empty(out_a, out_a.sizes());
  Tensor lse = torch::stable::new_empty(lse_a, lse_a.sizes());
  const MergeAttentionStatesParams params{
      .dtype = dtype,
      .num_rows = lse_a.numel(),
      .head_dim = static_cast<int>(out_a.size(3)),
      .out_a = out_a.data_ptr(),
      .lse_a = data<float>(lse_a),
      .out_b = out_b.data_ptr(),
      .lse_b = data<float>(lse_b),
      .out = out.data_ptr(),
      .lse = data<float>(lse),
  };
  launch(out_a, params, merge_attention_states_cpu, merge_attention_states_cuda);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));
}

}  // namespace hata
