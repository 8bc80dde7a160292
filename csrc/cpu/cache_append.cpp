#include "cache_append.h"

#include <algorithm>
#include <cstring>

#include "cpu/dtype.h"
#include "cpu/key_encoder.h"
#include "cpu/parallel.h"

namespace hata {
namespace {

// Writes a new key or value to the cache, from element `to_idx` on.
void store_row(const HotLoops& loops, const CacheAppendParams& p, const void* from, float scale,
               void* cache, int64_t to_idx) {
  const int head_dim = p.cache.head_dim;
  void* to = element(cache, p.cache.dtype, to_idx);
  if (p.cache.dtype == p.dtype) {
    std::memcpy(to, from, static_cast<size_t>(head_dim) * dtype_size(p.dtype));
    return;
  }
  float values[kMaxHeadDim];
  loops.to_float(from, p.dtype, head_dim, values);
  for (int d = 0; d < head_dim; ++d) values[d] /= scale;
  store_floats(values, head_dim, p.cache.dtype, to);
}

// Appends tokens [first, last) of sequence b to KV head h; at most kEncodeTile of them.
void append_tile(const HotLoops& loops, const CacheAppendParams& p, int64_t b, int64_t h, int first,
                 int last) {
  const DType dtype = p.dtype;
  const int head_dim = p.cache.head_dim, num_words = p.code_cache.num_words;
  const void* keys[kEncodeTile];
  int64_t pages[kEncodeTile], rows[kEncodeTile];
  int n = 0;
  for (int j = first; j < last; ++j) {
    const Slot slot = slot_of(p, static_cast<int>(b), j);
    if (slot.row < 0) continue;
    const int64_t page = slot.page, row = slot.row;
    keys[n] =
        element(p.k, dtype, b * p.k_batch_stride + j * p.k_token_stride + h * p.k_head_stride);
    const void* value =
        element(p.v, dtype, b * p.v_batch_stride + j * p.v_token_stride + h * p.v_head_stride);
    store_row(
        loops, p, keys[n], k_scale_of(p.cache, static_cast<int>(h)), p.cache.k,
        page * p.cache.k_page_stride + row * p.cache.k_token_stride + h * p.cache.k_head_stride);
    store_row(
        loops, p, value, v_scale_of(p.cache, static_cast<int>(h)), p.cache.v,
        page * p.cache.v_page_stride + row * p.cache.v_token_stride + h * p.cache.v_head_stride);
    pages[n] = page;
    rows[n++] = row;
  }
  if (num_words == 0) return;

  uint32_t codes[kEncodeTile * kMaxWords];
  uint16_t norms[kEncodeTile];
  const bool with_norms = p.code_cache.norms != nullptr;
  const int64_t weights_per_head = static_cast<int64_t>(head_dim) * num_words * kWordBits;
  encode_keys(loops, dtype, head_dim, num_words,
              element(p.key_weights, dtype, h * weights_per_head), keys, n, codes,
              with_norms ? norms : nullptr);
  for (int i = 0; i < n; ++i) {
    std::memcpy(p.code_cache.codes + pages[i] * p.code_cache.code_page_stride +
                    h * p.code_cache.code_head_stride + rows[i] * num_words,
                codes + i * num_words, static_cast<size_t>(num_words) * sizeof(uint32_t));
    if (with_norms) {
      p.code_cache.norms[pages[i] * p.code_cache.norm_page_stride +
                         h * p.code_cache.norm_head_stride + rows[i]] = norms[i];
    }
  }
}

}  // namespace

void cache_append_cpu(const CacheAppendParams& p) {
  const HotLoops& loops = hot_loops();
  const int64_t tiles = (p.q_len + kEncodeTile - 1) / kEncodeTile;
  const int64_t num_kv_heads = p.cache.num_kv_heads;
  parallel_for(p.table.batch * num_kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sequence_head = item / tiles;
      const int first = static_cast<int>(item % tiles) * kEncodeTile;
      append_tile(loops, p, sequence_head / num_kv_heads, sequence_head % num_kv_heads, first,
                  std::min(first + kEncodeTile, p.q_len));
    }
  });
}

}  // namespace hata
