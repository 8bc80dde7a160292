#include "decode_step.h"

namespace hata {

void decode_step_cuda(const DecodeStepParams& params, CudaStream stream) {
  cache_append_cuda(params.append, stream);
  encode_query_cuda(params.encode, stream);
  score_select_cuda(params.select, stream);
  gather_attention_cuda(params.attend, stream);
}

}  // namespace hata
