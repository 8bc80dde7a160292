#pragma once

#include <optional>

#include "bindings/checks.h"
#include "paged_cache.h"

namespace hata {

// A page table for caches of num_pages pages of page_size rows. On CPU its values are checked too.
PageTable page_table(const ArgumentChecks& check, const Tensor& block_table,
                     const Tensor& cache_seqlens, int64_t num_pages, int64_t page_size);

// Scales, of one element or one for each KV head, belong to float8 caches alone.
KvCache kv_cache(const ArgumentChecks& check, const Tensor& k_cache, const Tensor& v_cache,
                 const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale);

// The dtype that queries, new keys and new values must have beside a cache: the cache's, or where
// that is float8 any float's, which `t` says.
DType dtype_beside(const ArgumentChecks& check, const KvCache& cache, const Tensor& t,
                   const char* name);

CodeCache code_cache(const ArgumentChecks& check, const Tensor& codes,
                     const std::optional<Tensor>& norms);

}  // namespace hata
