#include <algorithm>

#include "cpu/isa.h"
#include "cpu/key_encoder.h"
#include "cpu/select_row.h"
#include "hata_internals.h"
#include "query_planes.h"

// The CPU loops of one instruction set, by its name.
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

hata::ScanPlanes scan_planes(const Array<uint32_t>& planes, int weight_sum) {
  hata::ScanPlanes scan{};
  scan.num_planes = static_cast<int>(planes.shape(0));
  scan.num_words = static_cast<int>(planes.shape(1));
  scan.max_matches = weight_sum * scan.num_words * hata::kWordBits;
  for (int p = 0; p < scan.num_planes; ++p) {
    scan.weights[p] = hata::plane_weight(p, weight_sum);
    std::copy_n(planes.data(p), scan.num_words, scan.planes[p]);
  }
  return scan;
}

// codes [n, num_words], planes [num_planes, num_words] -> [n].
Array<uint16_t> count_matches(const std::string& isa, const Array<uint32_t>& codes,
                              const Array<uint32_t>& planes, int weight_sum) {
  Array<uint16_t> matches(codes.shape(0));
  hata::loops_of_isa(isa).count_matches(scan_planes(planes, weight_sum), codes.data(),
                                        static_cast<int>(codes.shape(0)), matches.mutable_data());
  return matches;
}

// matches [n], norms [n] float16 bits, planes as above -> [n] float16 bits.
Array<uint16_t> apply_norms(const std::string& isa, const Array<uint16_t>& matches,
                            const Array<uint16_t>& norms, const Array<uint32_t>& planes,
                            int weight_sum) {
  Array<uint16_t> scores(matches.shape(0));
  hata::loops_of_isa(isa).apply_norms(scan_planes(planes, weight_sum), matches.data(), norms.data(),
                                      static_cast<int>(matches.shape(0)), scores.mutable_data());
  return scores;
}

// float16 bits [n] -> [n].
Array<float> to_float(const std::string& isa, const Array<uint16_t>& bits) {
  Array<float> values(bits.shape(0));
  hata::loops_of_isa(isa).to_float(bits.data(), hata::DType::kFloat16,
                                   static_cast<int>(bits.shape(0)), values.mutable_data());
  return values;
}

// float8 bits [n] -> [n], as rows of attention are read.
Array<float> float8_row(const std::string& isa, const Array<uint8_t>& bits) {
  Array<float> values(bits.shape(0));
  std::fill_n(values.mutable_data(), bits.shape(0), 0.0f);
  const float weight = 1.0f;
  const void* row = bits.data();
  hata::loops_of_isa(isa).add_weighted_rows(&weight, 1, 1, static_cast<int>(bits.shape(0)), &row, 1,
                                            hata::DType::kFloat8E4M3, values.mutable_data());
  return values;
}

// rows [n, head_dim], weights [head_dim, num_bits] -> [n, num_bits].
Array<float> project(const std::string& isa, const Array<float>& rows,
                     const Array<float>& weights) {
  Array<float> out({rows.shape(0), weights.shape(1)});
  hata::loops_of_isa(isa).project(
      rows.data(), static_cast<int>(rows.shape(0)), static_cast<int>(rows.shape(1)), weights.data(),
      hata::DType::kFloat32, static_cast<int>(weights.shape(1)), out.mutable_data());
  return out;
}

// values [num_bits] -> [num_words].
Array<uint32_t> pack_signs(const Array<float>& values) {
  const int num_words = hata::num_words(static_cast<int>(values.shape(0)));
  Array<uint32_t> code(num_words);
  hata::pack_signs(values.data(), num_words, code.mutable_data());
  return code;
}

// ranks [visible] -> (indices [top_k], rank of the last selected one, how many equal it).
template <class Rank>
py::tuple select_row(const hata::RankLoops<Rank>& loops, const Array<Rank>& ranks, int top_k,
                     int num_sink, int num_recent) {
  Array<int32_t> indices(top_k);
  const hata::RowCut<Rank> cut =
      hata::select_row(loops, ranks.data(), static_cast<int>(ranks.shape(0)), top_k, num_sink,
                       num_recent, indices.mutable_data());
  return py::make_tuple(indices, cut.last_rank, cut.num_ties);
}

}  // namespace

void add_cpu_loops(py::module_& m) {
  m.def("supported_isas", &hata::supported_isas);
  m.def("count_matches", &count_matches);
  m.def("apply_norms", &apply_norms);
  m.def("to_float", &to_float);
  m.def("float8_row", &float8_row);
  m.def("project", &project);
  m.def("pack_signs", &pack_signs);
  m.def("select_row16", [](const std::string& isa, const Array<uint16_t>& ranks, int top_k,
                           int num_sink, int num_recent) {
    return select_row(hata::loops_of_isa(isa).ranks16, ranks, top_k, num_sink, num_recent);
  });
  m.def("select_row32", [](const std::string& isa, const Array<uint32_t>& ranks, int top_k,
                           int num_sink, int num_recent) {
    return select_row(hata::loops_of_isa(isa).ranks32, ranks, top_k, num_sink, num_recent);
  });
}
