#include "bindings/caches.h"

#include <bit>
#include <string>

namespace hata {
namespace {

// What a kernel would have to skip silently, a CPU op can say.
void check_values(const ArgumentChecks& check, const PageTable& table, int64_t page_size) {
  for (int b = 0; b < table.batch; ++b) {
    const int seq_len = table.cache_seqlens[b];
    check.rule(
        seq_len >= 0 && seq_len <= table.capacity, "cache_seqlens",
        [&] { return "be in 0.." + std::to_string(table.capacity) + " (the capacity)"; },
        [&] { return std::to_string(seq_len) + " for sequence " + std::to_string(b); });
    for (int64_t p = 0; p * page_size < seq_len; ++p) {
      const int page = table.block_table[b * table.block_table_stride + p];
      check.rule(
          page >= 0 && page < table.num_pages, "block_table",
          [&] { return "name one of the " + std::to_string(table.num_pages) + " pages"; },
          [&] {
            return std::to_string(page) + " for page " + std::to_string(p) + " of sequence " +
                   std::to_string(b);
          });
    }
  }
}

// The scan loads a code in pieces of up to 16 bytes.
void codes_aligned(const ArgumentChecks& check, const Tensor& codes) {
  const int64_t num_words = codes.size(3);
  const int64_t piece = num_words % 4 == 0 ? 4 : (num_words % 2 == 0 ? 2 : 1);
  const bool aligned = reinterpret_cast<uintptr_t>(codes.data_ptr()) % (4 * piece) == 0 &&
                       codes.stride(0) % piece == 0 && codes.stride(1) % piece == 0;
  check.rule(
      aligned, "code_cache",
      [&] {
        return "start each head of a page at a multiple of " + std::to_string(4 * piece) + " bytes";
      },
      "other strides or offset");
}

const float* scale_data(const ArgumentChecks& check, const std::optional<Tensor>& scale,
                        const char* name, DType dtype, int64_t num_kv_heads) {
  if (!scale) return nullptr;
  check.rule(dtype == DType::kFloat8E4M3, name, "be None beside caches that are not Float8_e4m3fn",
             "a tensor");
  check.dtype_and_device(*scale, name, ScalarType::Float);
  check.rule(
      scale->numel() == 1 || (scale->dim() == 1 && scale->size(0) == num_kv_heads), name,
      [&] { return "have one element or num_kv_heads=" + std::to_string(num_kv_heads); },
      scale->numel());
  return data<float>(*scale);
}

int64_t scale_stride(const std::optional<Tensor>& scale) {
  return scale && scale->numel() > 1 ? scale->stride(0) : 0;
}

}  // namespace

PageTable page_table(const ArgumentChecks& check, const Tensor& block_table,
                     const Tensor& cache_seqlens, int64_t num_pages, int64_t page_size) {
  check.tensor(block_table, "block_table", ScalarType::Int, {{"batch"}, {"max_pages"}});
  check.last_dims_contiguous(block_table, "block_table", 1);
  const int64_t batch = block_table.size(0), max_pages = block_table.size(1);
  check.tensor(cache_seqlens, "cache_seqlens", ScalarType::Int, {{"batch", batch}});
  check.contiguous(cache_seqlens, "cache_seqlens");
  const bool one_page = max_pages == 1;
  check.rule(page_size > 0 && (one_page || std::has_single_bit(static_cast<uint64_t>(page_size))),
             "page_size", "be a power of two where a sequence has several pages", page_size);
  const int64_t capacity = max_pages * page_size;
  check.rule(capacity <= kMaxInt32 - 7, "block_table",
             "give each sequence at most 2^31 - 8 positions",
             [&] { return std::to_string(max_pages) + " pages of " + std::to_string(page_size); });
  const PageTable table{
      .batch = static_cast<int>(batch),
      .max_pages = static_cast<int>(max_pages),
      .num_pages = static_cast<int>(num_pages),
      .page_shift = one_page ? 31 : std::countr_zero(static_cast<uint64_t>(page_size)),
      .page_mask = static_cast<int>(one_page ? kMaxInt32 : page_size - 1),
      .capacity = static_cast<int>(capacity),
      .block_table = data<int32_t>(block_table),
      .cache_seqlens = data<int32_t>(cache_seqlens),
      .block_table_stride = block_table.stride(0),
  };
  if (!check.on_cuda()) check_values(check, table, page_size);
  return table;
}

KvCache kv_cache(const ArgumentChecks& check, const Tensor& k_cache, const Tensor& v_cache,
                 const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const DType dtype = check.row_dtype(k_cache, "k_cache");
  check.tensor(k_cache, "k_cache", scalar_type(dtype),
               {{"num_pages"}, {"page_size"}, {"num_kv_heads"}, {"head_dim"}});
  check.tensor(v_cache, "v_cache", scalar_type(dtype),
               {{"num_pages", k_cache.size(0)},
                {"page_size", k_cache.size(1)},
                {"num_kv_heads", k_cache.size(2)},
                {"head_dim", k_cache.size(3)}});
  check.last_dims_contiguous(k_cache, "k_cache", 1);
  check.last_dims_contiguous(v_cache, "v_cache", 1);
  check.rows_aligned(k_cache, "k_cache");
  check.rows_aligned(v_cache, "v_cache");
  check.head_dim(k_cache.size(3));
  return KvCache{
      .dtype = dtype,
      .num_kv_heads = static_cast<int>(k_cache.size(2)),
      .head_dim = static_cast<int>(k_cache.size(3)),
      .k = k_cache.data_ptr(),
      .v = v_cache.data_ptr(),
      .k_page_stride = k_cache.stride(0),
      .k_token_stride = k_cache.stride(1),
      .k_head_stride = k_cache.stride(2),
      .v_page_stride = v_cache.stride(0),
      .v_token_stride = v_cache.stride(1),
      .v_head_stride = v_cache.stride(2),
      .k_scale = scale_data(check, k_scale, "k_scale", dtype, k_cache.size(2)),
      .v_scale = scale_data(check, v_scale, "v_scale", dtype, k_cache.size(2)),
      .k_scale_stride = scale_stride(k_scale),
      .v_scale_stride = scale_stride(v_scale),
  };
}

DType dtype_beside(const ArgumentChecks& check, const KvCache& cache, const Tensor& t,
                   const char* name) {
  return cache.dtype == DType::kFloat8E4M3 ? check.float_dtype(t, name) : cache.dtype;
}

CodeCache code_cache(const ArgumentChecks& check, const Tensor& codes,
                     const std::optional<Tensor>& norms) {
  check.tensor(codes, "code_cache", ScalarType::Int,
               {{"num_pages"}, {"num_kv_heads"}, {"page_size"}, {"num_words"}});
  check.last_dims_contiguous(codes, "code_cache", 2);
  check.in_range(codes.size(3), "num_words", 1, kMaxWords);
  codes_aligned(check, codes);
  if (norms) {
    check.tensor(*norms, "norm_cache", ScalarType::Half,
                 {{"num_pages", codes.size(0)},
                  {"num_kv_heads", codes.size(1)},
                  {"page_size", codes.size(2)}});
    check.last_dims_contiguous(*norms, "norm_cache", 1);
  }
  return CodeCache{
      .num_words = static_cast<int>(codes.size(3)),
      .codes = data<uint32_t>(codes),
      .norms = norms ? data<uint16_t>(*norms) : nullptr,
      .code_page_stride = codes.stride(0),
      .code_head_stride = codes.stride(1),
      .norm_page_stride = norms ? norms->stride(0) : 0,
      .norm_head_stride = norms ? norms->stride(1) : 0,
  };
}

}  // namespace hata
