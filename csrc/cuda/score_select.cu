#include "score_select.h"

#include <stdexcept>

#include "cuda/decode_step/launch.h"

namespace hata {

void score_select_cuda(const ScoreSelectParams& p, CudaStream stream) {
  if (p.algorithm != ScoreSelectAlgorithm::kTwoKernels && score_select_cluster(p, stream)) return;
  if (p.algorithm != ScoreSelectAlgorithm::kAuto &&
      p.algorithm != ScoreSelectAlgorithm::kTwoKernels) {
    throw std::runtime_error(
        "hata::score_select: clusters need sm_90 or newer, at most 8 query tokens "
        "and a capacity of at most 16777216 positions");
  }
  hamming_score_cuda(rank_score_params(p), stream);
  select_topk_cuda(rank_select_params(p), stream);
}

}  // namespace hata
