#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace hata {

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

}  // namespace hata
