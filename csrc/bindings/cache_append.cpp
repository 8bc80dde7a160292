#include "cache_append.h"

#include <bit>

#include "bindings/caches.h"
#include "bindings/launch.h"
#include "bindings/params.h"

namespace hata {
namespace {

// Codes and norms, of num_words words; without a code cache no word, and no norm.
CodeCache checked_code_cache(const ArgumentChecks& check, const KvCache& cache, DType dtype,
                             const std::optional<Tensor>& key_weights, const Tensor& k_cache,
                             const std::optional<Tensor>& codes,
                             const std::optional<Tensor>& norm_cache) {
  check.rule(codes.has_value() == key_weights.has_value(), "key_weights",
             codes ? "be given with code_cache" : "be None without code_cache",
             codes ? "None" : "a tensor");
  if (!codes) {
    check.rule(!norm_cache, "norm_cache", "be None without code_cache", "a tensor");
    return CodeCache{};
  }
  const int words = check_hash_weights(check, *key_weights, "key_weights", dtype,
                                       cache.num_kv_heads, cache.head_dim);
  check.tensor(*codes, "code_cache", ScalarType::Int,
               {{"num_pages", k_cache.size(0)},
                {"num_kv_heads", cache.num_kv_heads},
                {"page_size", k_cache.size(1)},
                {"num_words", words}});
  return code_cache(check, *codes, norm_cache);
}

// The new tokens, whose shapes are checked, and the caches that they go to. k and v are [batch,
// q_len, num_kv_heads, head_dim], or without the batch.
CacheAppendParams token_params(const ArgumentChecks& check, const PageTable& table,
                               const KvCache& cache, const Tensor& k, const Tensor& v,
                               const std::optional<Tensor>& key_weights, const Tensor& k_cache,
                               const std::optional<Tensor>& code_cache,
                               const std::optional<Tensor>& norm_cache) {
  const DType dtype = dtype_beside(check, cache, k, "k");
  for (const auto& [t, name] : {std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    check.last_dims_contiguous(*t, name, 1);
    check.rows_aligned(*t, name);
  }
  const int64_t token_dim = k.dim() - 3;
  return CacheAppendParams{
      .table = table,
      .cache = cache,
      .code_cache =
          checked_code_cache(check, cache, dtype, key_weights, k_cache, code_cache, norm_cache),
      .dtype = dtype,
      .q_len = static_cast<int>(k.size(token_dim)),
      .new_seqlens = nullptr,
      .slot_mapping = nullptr,
      .k = k.data_ptr(),
      .v = v.data_ptr(),
      .key_weights = key_weights ? key_weights->data_ptr() : nullptr,
      .k_batch_stride = k.stride(0),
      .k_token_stride = k.stride(token_dim),
      .k_head_stride = k.stride(token_dim + 1),
      .v_batch_stride = v.stride(0),
      .v_token_stride = v.stride(token_dim),
      .v_head_stride = v.stride(token_dim + 1),
  };
}

}  // namespace

CacheAppendParams cache_append_params(const ArgumentChecks& check, const Tensor& k, const Tensor& v,
                                      const std::optional<Tensor>& key_weights,
                                      const Tensor& k_cache, const Tensor& v_cache,
                                      const std::optional<Tensor>& code_cache,
                                      const std::optional<Tensor>& norm_cache,
                                      const Tensor& block_table, const Tensor& cache_seqlens,
                                      const std::optional<Tensor>& new_seqlens,
                                      const std::optional<Tensor>& k_scale,
                                      const std::optional<Tensor>& v_scale) {
  const KvCache cache = kv_cache(check, k_cache, v_cache, k_scale, v_scale);
  const PageTable table =
      page_table(check, block_table, cache_seqlens, k_cache.size(0), k_cache.size(1));
  const ScalarType dtype = scalar_type(dtype_beside(check, cache, k, "k"));
  check.tensor(k, "k", dtype,
               {{"batch", table.batch},
                {"q_len"},
                {"num_kv_heads", cache.num_kv_heads},
                {"head_dim", cache.head_dim}});
  check.tensor(v, "v", dtype,
               {{"batch", table.batch},
                {"q_len", k.size(1)},
                {"num_kv_heads", cache.num_kv_heads},
                {"head_dim", cache.head_dim}});
  CacheAppendParams params =
      token_params(check, table, cache, k, v, key_weights, k_cache, code_cache, norm_cache);
  if (new_seqlens) {
    check.tensor(*new_seqlens, "new_seqlens", ScalarType::Int, {{"batch", table.batch}});
    check.contiguous(*new_seqlens, "new_seqlens");
    params.new_seqlens = data<int32_t>(*new_seqlens);
  }
  return params;
}

namespace {

void cache_append(const Tensor& k, const Tensor& v, std::optional<Tensor> key_weights,
                  Tensor k_cache, Tensor v_cache, std::optional<Tensor> code_cache,
                  std::optional<Tensor> norm_cache, const Tensor& block_table,
                  const Tensor& cache_seqlens, std::optional<Tensor> new_seqlens,
                  std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
  const ArgumentChecks check("cache_append", k, "k");
  launch(k,
         cache_append_params(check, k, v, key_weights, k_cache, v_cache, code_cache, norm_cache,
                             block_table, cache_seqlens, new_seqlens, k_scale, v_scale),
         cache_append_cpu, cache_append_cuda);
}

// The pages of cache_write: its tokens are one sequence without a block table.
PageTable page_pool(const ArgumentChecks& check, int64_t num_pages, int64_t page_size) {
  check.rule(page_size > 0 && std::has_single_bit(static_cast<uint64_t>(page_size)), "page_size",
             "be a power of two", page_size);
  return PageTable{
      .batch = 1,
      .max_pages = 0,
      .num_pages = static_cast<int>(num_pages),
      .page_shift = std::countr_zero(static_cast<uint64_t>(page_size)),
      .page_mask = static_cast<int>(page_size - 1),
      .capacity = 0,
      .block_table = nullptr,
      .cache_seqlens = nullptr,
      .block_table_stride = 0,
  };
}

void cache_write(const Tensor& k, const Tensor& v, const Tensor& key_weights, Tensor k_cache,
                 Tensor v_cache, Tensor code_cache, std::optional<Tensor> norm_cache,
                 const Tensor& slot_mapping, std::optional<Tensor> k_scale,
                 std::optional<Tensor> v_scale) {
  const ArgumentChecks check("cache_write", k, "k");
  const KvCache cache = kv_cache(check, k_cache, v_cache, k_scale, v_scale);
  const ScalarType dtype = scalar_type(dtype_beside(check, cache, k, "k"));
  check.tensor(
      k, "k", dtype,
      {{"num_tokens"}, {"num_kv_heads", cache.num_kv_heads}, {"head_dim", cache.head_dim}});
  check.tensor(v, "v", dtype,
               {{"num_tokens", k.size(0)},
                {"num_kv_heads", cache.num_kv_heads},
                {"head_dim", cache.head_dim}});
  CacheAppendParams params =
      token_params(check, page_pool(check, k_cache.size(0), k_cache.size(1)), cache, k, v,
                   key_weights, k_cache, code_cache, norm_cache);
  check.tensor(slot_mapping, "slot_mapping", ScalarType::Long, {{"num_tokens", k.size(0)}});
  check.contiguous(slot_mapping, "slot_mapping");
  params.slot_mapping = data<int64_t>(slot_mapping);
  if (!check.on_cuda()) {
    const int64_t num_slots = k_cache.size(0) * k_cache.size(1);
    for (int j = 0; j < params.q_len; ++j) {
      const int64_t slot = params.slot_mapping[j];
      check.rule(
          slot < num_slots, "slot_mapping",
          [&] { return "be below " + std::to_string(num_slots) + " (the capacity)"; },
          [&] { return std::to_string(slot) + " for token " + std::to_string(j); });
    }
  }
  launch(k, params, cache_append_cpu, cache_append_cuda);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("cache_append", TORCH_BOX(&cache_append));
  m.impl("cache_write", TORCH_BOX(&cache_write));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("cache_append", TORCH_BOX(&cache_append));
  m.impl("cache_write", TORCH_BOX(&cache_write));
}

}  // namespace hata
