#pragma once

#include "cache_append.h"

namespace hata {

// cache_append, and hash_encode as its special case: with table.block_table null, token j of
// sequence b is position j of page b; with cache.k null, keys and values are not copied. One kernel
// for both, so that a key's code does not depend on who asked for it.
void encode_keys(const CacheAppendParams& params, const char* op, CudaStream stream);

}  // namespace hata
