#include "merge_attention_states.h"

#include "cuda/primitives/attention_state.cuh"
#include "cuda/primitives/check.h"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kThreads = 256;

// grid: rows * head_dim / kThreads; one thread an element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_attention_states_kernel(const __grid_constant__ MergeAttentionStatesParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = i / p.head_dim;
  if (row >= p.num_rows) return;
  const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];
  const float lse = log_add_exp(lse_a, lse_b);
  const float weight_a = share_of_union(lse_a, lse), weight_b = share_of_union(lse_b, lse);
  // What an empty state holds may be anything, NaN too.
  float out = 0.0f;
  if (weight_a > 0.0f) out += weight_a * static_cast<float>(static_cast<const T*>(p.out_a)[i]);
  if (weight_b > 0.0f) out += weight_b * static_cast<float>(static_cast<const T*>(p.out_b)[i]);
  static_cast<T*>(p.out)[i] = static_cast<T>(out);
  if (i % p.head_dim == 0) p.lse[row] = lse;
}

template <typename T>
void launch(const MergeAttentionStatesParams& p, CudaStream stream) {
  const int64_t blocks = (p.num_rows * p.head_dim + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  merge_attention_states_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  cuda_check(cudaGetLastError(), "hata::merge_attention_states");
}

}  // namespace

void merge_attention_states_cuda(const MergeAttentionStatesParams& p, CudaStream stream) {
  if (p.dtype == DType::kFloat32) return launch<float>(p, stream);
  dispatch_dtype(p.dtype, [&]<typename T>() { launch<T>(p, stream); });
}

}  // namespace hata
