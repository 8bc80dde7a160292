#include "score_select.h"

namespace hata {

void score_select_cpu(const ScoreSelectParams& params) {
  hamming_score_cpu(rank_score_params(params));
  select_topk_cpu(rank_select_params(params));
}

}  // namespace hata
