#include "cache_append.h"

#include "bindings/caches.h"
#include "bindings/launch.h"
#include "bindings/params.h"

namespace hata {

CacheAppendParams cache_append_params(const ArgumentChecks& check, const Tensor& k, const Tensor& v,
                                      const Tensor& key_weights, const Tensor& k_cache,
                                      const Tensor& v_cache, const Tensor& code_cache_,
                                      const std::optional<Tensor>& norm_cache,
                                      const Tensor& block_table, const Tensor& cache_seqlens,
                                      const std::optional<Tensor>& new_seqlens) {
  const KvCache cache = kv_cache(check, k_cache, v_cache);
  const PageTable table =
      page_table(check, block_table, cache_seqlens, k_cache.size(0), k_cache.size(1));
  check.tensor(k, "k", scalar_type(cache.dtype),
               {{"batch", table.batch},
                {"q_len"},
                {"num_kv_heads", cache.num_kv_heads},
                {"head_dim", cache.head_dim}});
  check.tensor(v, "v", scalar_type(cache.dtype),
               {{"batch", table.batch},
                {"q_len", k.size(1)},
                {"num_kv_heads", cache.num_kv_heads},
                {"head_dim", cache.head_dim}});
  for (const auto& [t, name] : {std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    check.last_dims_contiguous(*t, name, 1);
    check.rows_aligned(*t, name);
  }
  const int words = check_hash_weights(check, key_weights, "key_weights", cache.dtype,
                                       cache.num_kv_heads, cache.head_dim);
  check.tensor(code_cache_, "code_cache", ScalarType::Int,
               {{"num_pages", k_cache.size(0)},
                {"num_kv_heads", cache.num_kv_heads},
                {"page_size", k_cache.size(1)},
                {"num_words", words}});
  if (new_seqlens) {
    check.tensor(*new_seqlens, "new_seqlens", ScalarType::Int, {{"batch", table.batch}});
    check.contiguous(*new_seqlens, "new_seqlens");
  }
  return CacheAppendParams{
      .table = table,
      .cache = cache,
      .code_cache = code_cache(check, code_cache_, norm_cache),
      .q_len = static_cast<int>(k.size(1)),
      .new_seqlens = new_seqlens ? data<int32_t>(*new_seqlens) : nullptr,
      .k = k.data_ptr(),
      .v = v.data_ptr(),
      .key_weights = key_weights.data_ptr(),
      .k_batch_stride = k.stride(0),
      .k_token_stride = k.stride(1),
      .k_head_stride = k.stride(2),
      .v_batch_stride = v.stride(0),
      .v_token_stride = v.stride(1),
      .v_head_stride = v.stride(2),
  };
}

namespace {

void cache_append(const Tensor& k, const Tensor& v, const Tensor& key_weights, Tensor k_cache,
                  Tensor v_cache, Tensor code_cache_, std::optional<Tensor> norm_cache,
                  const Tensor& block_table, const Tensor& cache_seqlens,
                  std::optional<Tensor> new_seqlens) {
  const ArgumentChecks check("cache_append", k, "k");
  launch(k,
         cache_append_params(check, k, v, key_weights, k_cache, v_cache, code_cache_, norm_cache,
                             block_table, cache_seqlens, new_seqlens),
         cache_append_cpu, cache_append_cuda);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hata, CPU, m) {
  m.impl("cache_append", TORCH_BOX(&cache_append));
}
STABLE_TORCH_LIBRARY_IMPL(hata, CUDA, m) {
  m.impl("cache_append", TORCH_BOX(&cache_append));
}

}  // namespace hata
