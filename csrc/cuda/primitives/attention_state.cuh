#pragma once

#include <cmath>

// The state of a softmax over a set of keys, which merges with the state over another set.
//
// While keys are being seen, it is kept in base 2: max, the largest logit_t log2(e) of the set;
// sum, of 2^(logit_t log2(e) - max); and beside them for each channel out, the sum of 2^(logit_t
// log2(e) - max) v_t. To merge states, the sums and outs of each are multiplied with its weight,
// 2^(max - the largest max of all), and added up. Finished, it is the normalized output, out / sum,
// and the natural log of the sum of exponentials, lse = ln(sum_t exp(logit_t)). Finished states
// merge by their share of the union, exp(lse - lse of the union).
//
// An empty set has max = -infinity and sum = 0; finished, out = 0 and lse = -infinity.
namespace hata {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Returns what a state whose maximum is `max` is multiplied with in a union whose maximum is
// `union_max`, also where both are empty.
__device__ __forceinline__ float weight_in_union(float max, float union_max) {
  return max == -INFINITY ? 0.0f : exp2f(max - union_max);
}

struct AttentionState {
  float max, sum;

  // Return the finished state: one channel of its output, and its log-sum-exp.
  __device__ __forceinline__ float finish(float out) const {
    return sum == 0.0f ? 0.0f : out / sum;
  }
  __device__ __forceinline__ float lse() const {
    return sum == 0.0f ? -INFINITY : (max + log2f(sum)) * kLn2;
  }
};

// Returns ln(exp(a) + exp(b)); -infinity for two empty states, where the difference would be NaN.
__device__ __forceinline__ float log_add_exp(float a, float b) {
  const float larger = fmaxf(a, b);
  if (larger == -INFINITY) return -INFINITY;
  return larger + logf(expf(a - larger) + expf(b - larger));
}

// Returns the share of a finished state in a union.
__device__ __forceinline__ float share_of_union(float lse, float union_lse) {
  return lse == -INFINITY ? 0.0f : expf(lse - union_lse);
}

}  // namespace hata
