#pragma once

#include <optional>

#include "bindings/checks.h"
#include "paged_cache.h"

namespace hata {

// A page table for caches of num_pages pages of page_size rows. On CPU its values are checked too.
PageTable page_table(const ArgumentChecks& check, const Tensor& block_table,
                     const Tensor& cache_seqlens, int64_t num_pages, int64_t page_size);

KvCache kv_cache(const ArgumentChecks& check, const Tensor& k_cache, const Tensor& v_cache);

CodeCache code_cache(const ArgumentChecks& check, const Tensor& codes,
                     const std::optional<Tensor>& norms);

}  // namespace hata
