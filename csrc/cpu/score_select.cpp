#include "score_select.h"

namespace hata {

void score_select_cpu(const ScoreSelectParams& p) {
  hamming_score_cpu(key_score_params(p));
  select_topk_cpu(key_select_params(p));
}

}  // namespace hata
