#include "score_select.h"

#include <stdexcept>

#include "cuda/score_select_cluster.h"

namespace hata {

void score_select_cuda(const ScoreSelectParams& p, CudaStream stream) {
  if (p.algorithm != ScoreSelectAlgorithm::kTwoKernels && score_select_cluster(p, stream)) return;
  if (p.algorithm == ScoreSelectAlgorithm::kCluster ||
      p.algorithm == ScoreSelectAlgorithm::kCandidates) {
    throw std::runtime_error(
        "hata::score_select: clusters need sm_90 or newer, at most 8 query tokens "
        "and a capacity of at most 20 million positions");
  }
  hamming_score_cuda(key_score_params(p), stream);
  select_topk_cuda(key_select_params(p), stream);
}

}  // namespace hata
