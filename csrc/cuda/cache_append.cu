#include "cache_append.h"

#include "cuda/encode_keys.h"

namespace hata {

void cache_append_cuda(const CacheAppendParams& params, CudaStream stream) {
  encode_keys(params, "hata::cache_append", stream);
}

}  // namespace hata
