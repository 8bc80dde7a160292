#include "merge_attention_states.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/hot_loops.h"
#include "cpu/parallel.h"

namespace hata {

void merge_attention_states_cpu(const MergeAttentionStatesParams& p) {
  const HotLoops& loops = hot_loops();
  parallel_for(p.num_rows, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> a(static_cast<size_t>(p.head_dim)), b(a);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * p.head_dim;
      loops.to_float(element(p.out_a, p.dtype, first), p.dtype, p.head_dim, a.data());
      loops.to_float(element(p.out_b, p.dtype, first), p.dtype, p.head_dim, b.data());
      const float largest = std::max(p.lse_a[row], p.lse_b[row]);
      if (largest == -std::numeric_limits<float>::infinity()) {
        std::fill(a.begin(), a.end(), 0.0f);
        p.lse[row] = largest;
      } else {
        const float weight_a = std::exp(p.lse_a[row] - largest);
        const float weight_b = std::exp(p.lse_b[row] - largest);
        const float sum = weight_a + weight_b;
        for (int d = 0; d < p.head_dim; ++d) {
          a[d] = (weight_a > 0.0f ? weight_a * a[d] : 0.0f) / sum +
                 (weight_b > 0.0f ? weight_b * b[d] : 0.0f) / sum;
        }
        p.lse[row] = largest + std::log(sum);
      }
      store_floats(a.data(), p.head_dim, p.dtype, element(p.out, p.dtype, first));
    }
  });
}

}  // namespace hata
