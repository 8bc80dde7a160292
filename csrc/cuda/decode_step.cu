#include "decode_step.h"

#include "cuda/decode_step/launch.h"

namespace hata {

void decode_step_cuda(const DecodeStepParams& params, CudaStream stream) {
  const ScoreSelectAlgorithm algorithm = params.select.algorithm;
  const bool one_launch =
      algorithm != ScoreSelectAlgorithm::kTwoKernels && algorithm != ScoreSelectAlgorithm::kCluster;
  if (one_launch && decode_step_cluster(params, stream)) return;
  if (algorithm == ScoreSelectAlgorithm::kTwoKernels ||
      !encode_score_select_cluster(params, stream)) {
    cache_append_cuda(params.append, stream);
    encode_query_cuda(params.encode, stream);
    score_select_cuda(params.select, stream);
  }
  GatherAttentionParams attend = params.attend;
  attend.queries_are_ready = true;
  gather_attention_cuda(attend, stream);
}

}  // namespace hata
