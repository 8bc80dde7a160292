#include "score_select.h"

#include <stdexcept>

#include "cuda/score_select_cluster.h"

namespace hata {

void score_select_cuda(const ScoreSelectParams& p, CudaStream stream) {
  if (p.algorithm != ScoreSelectAlgorithm::kTwoKernels && score_select_cluster(p, stream)) return;
  if (p.algorithm == ScoreSelectAlgorithm::kCluster ||
      p.algorithm == ScoreSelectAlgorithm::kCandidates) {
    throw std::runtime_error(
        "hata::score_select: clusters need sm_90 or newer and at most 8 query tokens");
  }
  hamming_score_cuda(key_score_params(p), stream);
  select_topk_cuda(key_select_params(p), stream);
}

}  // namespace hata
