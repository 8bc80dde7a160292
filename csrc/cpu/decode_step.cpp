#include "decode_step.h"

namespace hata {

void decode_step_cpu(const DecodeStepParams& params) {
  cache_append_cpu(params.append);
  encode_query_cpu(params.encode);
  score_select_cpu(params.select);
  gather_attention_cpu(params.attend);
}

}  // namespace hata
