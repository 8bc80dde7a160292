// Which positions fall into a query's buckets of locality-sensitive hash tables, and how often.
//
// A position t is retrieved for query head i of KV head h = i / group if
// |{l : t is in bucket buckets[b, i, l] of table l of h}| >= min_collisions
// (MagicPIG, arXiv 2410.16179, algorithm 1, with 2).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_int32(const Tensor& t, const char* name, int64_t num_dims) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Int && t.dim() == num_dims,
      "lsh_tables: ", name, " must be contiguous int32 on the CPU, with ", num_dims, " dimensions");
}

// buckets    [batch, num_heads, num_tables]: the buckets of each query head
// starts     [batch, num_kv_heads, num_tables, num_buckets + 1]: where each bucket begins in
// positions  [batch, num_kv_heads, num_tables, num_positions]: a table, bucket after bucket; every
//            value is in 0..capacity - 1
// Returns indices [batch, group, num_kv_heads, longest list], -1 behind each list: as
// gather_attention takes them, with the heads of a group as query tokens.
Tensor retrieve(const Tensor& buckets, const Tensor& starts, const Tensor& positions,
                int64_t capacity, int64_t min_collisions) {
  check_int32(buckets, "buckets", 3);
  check_int32(starts, "starts", 4);
  check_int32(positions, "positions", 4);
  const int64_t batch = buckets.size(0), num_heads = buckets.size(1), num_tables = buckets.size(2);
  const int64_t num_kv_heads = starts.size(1), num_starts = starts.size(3);
  const int64_t group = num_heads / num_kv_heads, num_positions = positions.size(3);
  STD_TORCH_CHECK(num_tables <= UINT8_MAX, "lsh_tables: there are at most 255 tables");
  const auto* bucket_data = static_cast<const int32_t*>(buckets.data_ptr());
  const auto* start_data = static_cast<const int32_t*>(starts.data_ptr());
  const auto* position_data = static_cast<const int32_t*>(positions.data_ptr());

  std::vector<std::vector<int32_t>> lists(batch * num_heads);
  torch::stable::parallel_for(0, batch * num_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> collisions(capacity);
    for (int64_t list = begin; list < end; ++list) {
      const int64_t first_table = list / group * num_tables;  // heads of a group are neighbours
      std::vector<int32_t>& found = lists[list];
      const auto for_each = [&](auto visit) {
        for (int64_t l = 0; l < num_tables; ++l) {
          const int32_t* start =
              start_data + (first_table + l) * num_starts + bucket_data[list * num_tables + l];
          const int32_t* table = position_data + (first_table + l) * num_positions;
          for (int32_t i = start[0]; i < start[1]; ++i) visit(table[i]);
        }
      };
      for_each([&](int32_t t) {
        if (++collisions[t] == min_collisions) found.push_back(t);
      });
      for_each([&](int32_t t) { collisions[t] = 0; });  // what the next list starts with
    }
  });

  size_t longest = 1;
  for (const auto& list : lists) longest = std::max(longest, list.size());
  Tensor indices = torch::stable::new_empty(
      buckets, {batch, group, num_kv_heads, static_cast<int64_t>(longest)});
  auto* index_data = static_cast<int32_t*>(indices.data_ptr());
  for (int64_t list = 0; list < batch * num_heads; ++list) {
    const int64_t b = list / num_heads, head = list % num_heads;
    const int64_t row = (b * group + head % group) * num_kv_heads + head / group;
    int32_t* out = std::ranges::copy(lists[list], index_data + row * longest).out;
    std::fill(out, index_data + (row + 1) * longest, -1);
  }
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY(lsh_tables, m) {
  m.def(
      "retrieve(Tensor buckets, Tensor starts, Tensor positions, int capacity, "
      "int min_collisions) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lsh_tables, CPU, m) {
  m.impl("retrieve", TORCH_BOX(&retrieve));
}
