#include "fetch_rows.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "bindings/caches.h"
#include "bindings/checks.h"
#include "bindings/launch.h"

namespace hata {
namespace {

constexpr int64_t kMaxSlots = 1 << 20;  // a bit each in a block's shared memory

void fetch_rows(const Tensor& indices, const Tensor& k_cache, const Tensor& v_cache,
                const Tensor& block_table, const Tensor& cache_seqlens, Tensor k_rows,
                Tensor v_rows, Tensor slot_of_row, Tensor position_of_slot, Tensor referenced,
                Tensor hand, Tensor slots, Tensor missing, Tensor num_missing) {
  const ArgumentChecks check("fetch_rows", indices, "indices");
  const KvCache cache = kv_cache(check, k_cache, v_cache, std::nullopt, std::nullopt);
  const PageTable table =
      page_table(check, block_table, cache_seqlens, k_cache.size(0), k_cache.size(1));
  const Dim batch{"batch", table.batch}, num_kv_heads{"num_kv_heads", cache.num_kv_heads};
  check.tensor(indices, "indices", ScalarType::Int, {batch, {"1", 1}, num_kv_heads, {"top_k"}});
  const int64_t top_k = indices.size(3);
  check.tensor(k_rows, "k_rows", scalar_type(cache.dtype),
               {batch, {"num_slots"}, num_kv_heads, {"head_dim", cache.head_dim}});
  check.in_range(k_rows.size(1), "num_slots", std::max<int64_t>(top_k, 1), kMaxSlots);
  const Dim num_slots{"num_slots", k_rows.size(1)};
  check.tensor(v_rows, "v_rows", scalar_type(cache.dtype),
               {batch, num_slots, num_kv_heads, {"head_dim", cache.head_dim}});
  check.tensor(slot_of_row, "slot_of_row", ScalarType::Int,
               {{"num_pages", k_cache.size(0)}, num_kv_heads, {"page_size", k_cache.size(1)}});
  check.tensor(position_of_slot, "position_of_slot", ScalarType::Int,
               {batch, num_kv_heads, num_slots});
  check.tensor(referenced, "referenced", ScalarType::Byte, {batch, num_kv_heads, num_slots});
  check.tensor(hand, "hand", ScalarType::Int, {batch, num_kv_heads});
  const Dim list{"top_k", top_k};
  check.tensor(slots, "slots", ScalarType::Int, {batch, {"1", 1}, num_kv_heads, list});
  check.tensor(missing, "missing", ScalarType::Int, {batch, {"1", 1}, num_kv_heads, list});
  check.tensor(num_missing, "num_missing", ScalarType::Int, {batch, num_kv_heads});
  for (const auto& [t, name] : {std::pair{&k_rows, "k_rows"}, std::pair{&v_rows, "v_rows"}}) {
    check.last_dims_contiguous(*t, name, 1);
    check.rows_aligned(*t, name);
  }
  const std::pair<const Tensor*, const char*> lists[] = {
      {&indices, "indices"},         {&slots, "slots"},
      {&missing, "missing"},         {&num_missing, "num_missing"},
      {&slot_of_row, "slot_of_row"}, {&position_of_slot, "position_of_slot"},
      {&referenced, "referenced"},   {&hand, "hand"}};
  for (const auto& [t, name] : lists) check.contiguous(*t, name);
  const FetchRowsParams params{
      .table = table,
      .cache = cache,
      .rows = {.num_slots = static_cast<int>(num_slots.size),
               .k = k_rows.data_ptr(),
               .v = v_rows.data_ptr(),
               .k_batch_stride = k_rows.stride(0),
               .k_slot_stride = k_rows.stride(1),
               .k_head_stride = k_rows.stride(2),
               .v_batch_stride = v_rows.stride(0),
               .v_slot_stride = v_rows.stride(1),
               .v_head_stride = v_rows.stride(2),
               .slot_of_row = data<int32_t>(slot_of_row),
               .position_of_slot = data<int32_t>(position_of_slot),
               .referenced = data<uint8_t>(referenced),
               .hand = data<int32_t>(hand)},
      .page_size = static_cast<int>(k_cache.size(1)),
      .element_bytes = static_cast<int>(k_cache.element_size()),
      .top_k = static_cast<int>(top_k),
      .indices = data<int32_t>(indices),
      .slots = data<int32_t>(slots),
      .missing = data<int32_t>(missing),
      .num_missing = data<int32_t>(num_missing),
  };
  launch(indices, params, fetch_rows_cpu, fetch_rows_cuda);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("fetch_rows", TORCH_BOX(&fetch_rows));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("fetch_rows", TORCH_BOX(&fetch_rows));
}

}  // namespace hata
