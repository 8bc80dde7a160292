#pragma once

#include "cpu/hot_loops.h"

namespace hata {

// Keys that are encoded together: enough to use each weight several times once it is loaded.
inline constexpr int kEncodeTile = 16;

// The codes [n, num_words] and norms [n] (null where not wanted) of n <= kEncodeTile keys of one KV
// head, each of head_dim elements at its own address; weights are that head's.
void encode_keys(const HotLoops& loops, DType dtype, int head_dim, int num_words,
                 const void* weights, const void* const* keys, int n, uint32_t* codes,
                 uint16_t* norms);

// Bit i of code is values[i] > 0.
void pack_signs(const float* values, int num_words, uint32_t* code);

}  // namespace hata
