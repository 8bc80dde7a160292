#include "score_select.h"

#include "hamming_score.h"
#include "select_topk.h"

namespace hata {

void score_select_cuda(const ScoreSelectParams& p, CudaStream stream) {
  hamming_score_cuda(key_score_params(p), stream);
  select_topk_cuda(key_select_params(p), stream);
}

}  // namespace hata
