#include "score_select.h"

namespace hata {

void score_select_cpu(const ScoreSelectParams& params) {
  hamming_score_cpu(key_score_params(params));
  select_topk_cpu(key_select_params(params));
}

}  // namespace hata
