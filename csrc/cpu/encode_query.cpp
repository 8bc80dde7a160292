#include "encode_query.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/hot_loops.h"
#include "cpu/parallel.h"
#include "query_planes.h"

namespace hata {
namespace {

// The levels (query_planes.h) of query_bits 2 to 4 from the projections z [num_bits].
void quantize(const float* z, int num_bits, int weight_sum, int* levels) {
  float largest = 0.0f;
  for (int i = 0; i < num_bits; ++i) largest = std::max(largest, std::fabs(z[i]));
  const float scale = static_cast<float>(weight_sum);
  for (int i = 0; i < num_bits; ++i) {
    const float ratio = largest > 0.0f ? z[i] / largest : 0.0f;
    const float level = std::floor((ratio * scale + scale) / 2.0f + 0.5f);
    levels[i] = level > 0.0f ? static_cast<int>(std::min(level, scale)) : 0;
  }
}

void write_planes(const int* levels, int num_words, int weight_sum, uint32_t* planes) {
  const int planes_count = num_planes(weight_sum);
  std::fill_n(planes, planes_count * num_words, 0u);
  for (int i = 0; i < num_words * kWordBits; ++i) {
    const unsigned set = level_planes(levels[i], weight_sum);
    for (int p = 0; p < planes_count; ++p) {
      planes[p * num_words + i / kWordBits] |= ((set >> p) & 1u) << (i % kWordBits);
    }
  }
}

}  // namespace

void encode_query_cpu(const EncodeQueryParams& p) {
  const HotLoops& loops = hot_loops();
  const int num_bits = p.num_words * kWordBits;
  const int group = p.num_heads / p.num_kv_heads;
  const int planes_size = num_planes(p.weight_sum) * p.num_words;
  const int64_t weights_per_head = static_cast<int64_t>(p.head_dim) * num_bits;

  const int64_t items = static_cast<int64_t>(p.batch) * p.q_len * p.num_kv_heads;
  parallel_for(items, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> heads(static_cast<size_t>(group) * p.head_dim);
    std::vector<float> projections(static_cast<size_t>(group) * num_bits);
    int levels[kMaxWords * kWordBits];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t h = item % p.num_kv_heads;
      const int64_t token = item / p.num_kv_heads;
      const int64_t b = token / p.q_len, j = token % p.q_len;
      for (int g = 0; g < group; ++g) {
        loops.to_float(element(p.q, p.dtype,
                               b * p.q_batch_stride + j * p.q_token_stride +
                                   (h * group + g) * p.q_head_stride),
                       p.dtype, p.head_dim, heads.data() + static_cast<int64_t>(g) * p.head_dim);
      }
      const void* weights = element(p.query_weights, p.dtype, h * weights_per_head);
      if (p.query_bits == 1) {
        loops.project(heads.data(), group, p.head_dim, weights, p.dtype, num_bits,
                      projections.data());
        std::fill_n(levels, num_bits, 0);
        for (int g = 0; g < group; ++g) {
          for (int i = 0; i < num_bits; ++i) levels[i] += projections[g * num_bits + i] > 0.0f;
        }
      } else {
        for (int g = 1; g < group; ++g) {
          for (int d = 0; d < p.head_dim; ++d) heads[d] += heads[g * p.head_dim + d];
        }
        loops.project(heads.data(), 1, p.head_dim, weights, p.dtype, num_bits, projections.data());
        quantize(projections.data(), num_bits, p.weight_sum, levels);
      }
      write_planes(levels, p.num_words, p.weight_sum, p.planes + item * planes_size);
    }
  });
}

}  // namespace hata
