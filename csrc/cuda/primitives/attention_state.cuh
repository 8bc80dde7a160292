#pragma once

#include <cmath>

// The state of a softmax over a set of keys is (out, lse): the normalized output and the natural
// log of the sum of exponentials. An empty set has out = 0 and lse = -infinity.
namespace hata {

// ln(exp(a) + exp(b)); -infinity for two empty states, where the difference would be NaN.
__device__ __forceinline__ float log_add_exp(float a, float b) {
  const float larger = fmaxf(a, b);
  if (larger == -INFINITY) return -INFINITY;
  return larger + logf(expf(a - larger) + expf(b - larger));
}

// The share of one state in their union.
__device__ __forceinline__ float state_weight(float lse_part, float lse) {
  return lse_part == -INFINITY ? 0.0f : expf(lse_part - lse);
}

}  // namespace hata
