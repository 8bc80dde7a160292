#include "paged_cache.h"

#include <optional>

#include "cache_append.h"
#include "hata_internals.h"

namespace {

using IntArray = py::array_t<int32_t, py::array::c_style>;

// A PageTable that keeps its arrays alive.
class OwnedPageTable {
 public:
  OwnedPageTable(IntArray block_table, IntArray cache_seqlens, int num_pages, int page_size,
                 int page_shift, int page_mask)
      : block_table_(std::move(block_table)),
        cache_seqlens_(std::move(cache_seqlens)),
        table_{.batch = static_cast<int>(block_table_.shape(0)),
               .max_pages = static_cast<int>(block_table_.shape(1)),
               .num_pages = num_pages,
               .page_shift = page_shift,
               .page_mask = page_mask,
               .capacity = static_cast<int>(block_table_.shape(1)) * page_size,
               .block_table = block_table_.data(),
               .cache_seqlens = cache_seqlens_.data(),
               .block_table_stride = block_table_.shape(1)} {}

  int page_of(int batch_idx, int t) const { return hata::page_of(table_, batch_idx, t); }
  int row_of(int t) const { return hata::row_of(table_, t); }
  int seq_len_of(int batch_idx) const { return hata::seq_len_of(table_, batch_idx); }
  int append_position(const std::optional<IntArray>& new_seqlens, int q_len, int batch_idx,
                      int j) const {
    const int32_t* lengths = new_seqlens ? new_seqlens->data() : nullptr;
    return hata::append_position(table_, lengths, q_len, batch_idx, j);
  }

 private:
  IntArray block_table_, cache_seqlens_;
  hata::PageTable table_;
};

}  // namespace

void add_page_table(py::module_& m) {
  m.def("visible_len", &hata::visible_len);
  py::class_<OwnedPageTable>(m, "PageTable")
      .def(py::init<IntArray, IntArray, int, int, int, int>(), py::arg("block_table"),
           py::arg("cache_seqlens"), py::kw_only(), py::arg("num_pages"), py::arg("page_size"),
           py::arg("page_shift"), py::arg("page_mask"))
      .def("page_of", &OwnedPageTable::page_of)
      .def("row_of", &OwnedPageTable::row_of)
      .def("seq_len_of", &OwnedPageTable::seq_len_of)
      .def("append_position", &OwnedPageTable::append_position);
}
