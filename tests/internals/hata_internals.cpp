// The constexpr contract of csrc/*.h for numpy. page_table.cpp and cpu_loops.cpp add the rest.

#include "hata_internals.h"

#include "cpu/dtype.h"
#include "dense_attention.h"
#include "hash_code.h"
#include "query_planes.h"
#include "selection.h"
#include "workspace.h"

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// code_bit of every bit: codes [n, num_words] -> [n, num_bits].
Array<bool> code_bits(const Array<uint32_t>& codes) {
  const py::ssize_t n = codes.shape(0), num_bits = codes.shape(1) * hata::kWordBits;
  Array<bool> bits({n, num_bits});
  for (py::ssize_t r = 0; r < n; ++r) {
    for (py::ssize_t i = 0; i < num_bits; ++i) {
      bits.mutable_at(r, i) = hata::code_bit(codes.data(r), static_cast<int>(i));
    }
  }
  return bits;
}

py::dict workspace_layout(int64_t batch, int64_t q_len, int64_t num_heads, int64_t num_kv_heads,
                          int64_t head_dim, int64_t max_seq_len, int64_t top_k) {
  const hata::WorkspaceLayout layout =
      hata::workspace_layout(batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len, top_k);
  py::dict offsets;
  offsets["planes"] = layout.planes;
  offsets["ranks"] = layout.ranks;
  offsets["out_partial"] = layout.out_partial;
  offsets["lse_partial"] = layout.lse_partial;
  offsets["size"] = layout.size;
  return offsets;
}

}  // namespace

PYBIND11_MODULE(hata_internals, m) {
  m.def("code_bits", &code_bits);

  m.def("plane_weight_sum", &hata::plane_weight_sum);
  m.def("num_planes", &hata::num_planes);
  m.def("plane_weight", &hata::plane_weight);
  m.def("level_planes", &hata::level_planes);

  m.def("ordered_rank_float16", py::vectorize(&hata::ordered_rank_float16));
  m.def("ordered_rank_float32", py::vectorize(&hata::ordered_rank_float32));
  m.def("ordered_rank_int32", py::vectorize(&hata::ordered_rank_int32));
  m.def("always_selected", py::vectorize(&hata::always_selected));

  m.def("float16_to_float", py::vectorize(&hata::float16_to_float));
  m.def("float_to_float16", py::vectorize(&hata::float_to_float16));
  m.def("bfloat16_to_float", py::vectorize(&hata::bfloat16_to_float));
  m.def("float_to_bfloat16", py::vectorize(&hata::float_to_bfloat16));

  m.def("attention_num_splits", &hata::attention_num_splits);
  m.def("split_sequence", [](int seq_len, int num_splits) {
    const auto [pieces, used] = hata::split_sequence(seq_len, num_splits);
    return std::pair(pieces, used);
  });
  m.def("workspace_layout", &workspace_layout);
  m.attr("MAX_PLANES") = hata::kMaxPlanes;
  m.attr("MAX_WORDS") = hata::kMaxWords;
  m.attr("MAX_SPLITS") = hata::kMaxSplits;
  m.attr("MIN_ROWS_PER_SPLIT") = hata::kMinRowsPerSplit;
  m.attr("TARGET_BLOCKS") = hata::kTargetBlocks;
  m.attr("WORKSPACE_ALIGNMENT") = hata::kWorkspaceAlignment;

  add_page_table(m);
  add_cpu_loops(m);
}
