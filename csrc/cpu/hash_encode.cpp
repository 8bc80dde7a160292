#include "hash_encode.h"

#include <algorithm>

#include "cpu/dtype.h"
#include "cpu/key_encoder.h"
#include "cpu/parallel.h"

namespace hata {

void hash_encode_cpu(const HashEncodeParams& p) {
  const HotLoops& loops = hot_loops();
  const int64_t tiles = (p.seq_len + kEncodeTile - 1) / kEncodeTile;
  const int64_t weights_per_head = static_cast<int64_t>(p.head_dim) * p.num_words * kWordBits;

  parallel_for(p.batch * p.num_kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sequence_head = item / tiles;
      const int64_t b = sequence_head / p.num_kv_heads, h = sequence_head % p.num_kv_heads;
      const int s = static_cast<int>(item % tiles) * kEncodeTile;
      const int n = std::min(kEncodeTile, p.seq_len - s);
      const void* keys[kEncodeTile];
      for (int i = 0; i < n; ++i) {
        keys[i] =
            element(p.keys, p.dtype,
                    b * p.key_batch_stride + (s + i) * p.key_seq_stride + h * p.key_head_stride);
      }
      const int64_t first = sequence_head * p.seq_len + s;
      encode_keys(loops, p.dtype, p.head_dim, p.num_words,
                  element(p.key_weights, p.dtype, h * weights_per_head), keys, n,
                  p.codes + first * p.num_words, p.norms != nullptr ? p.norms + first : nullptr);
    }
  });
}

}  // namespace hata
