#include "encode_query.h"

#include <algorithm>

#include "cuda/codes/encode_planes.cuh"
#include "cuda/primitives/launch.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kThreads = kMaxWords * kWarpSize;
constexpr int kMaxWeightBytes = 80 * 1024;  // of a block, so that every GPU from sm_80 on has it

// grid: batch * q_len * num_kv_heads. The block loads the weights of words_per_pass words at a time
// and its warps project the group's queries onto their columns, kTileColumns at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    encode_query_kernel(const __grid_constant__ EncodeQueryParams p, int words_per_pass) {
  extern __shared__ __align__(16) uint16_t weights[];  // [words_per_pass, head_dim, kWeightPitch]
  __shared__ float values[kMaxWords * kWordBits];
  __shared__ uint32_t largest;
  wait_for_previous_kernel();
  let_next_kernel_launch();
  const int warp = threadIdx.x / kWarpSize;
  const int kv_head_idx = blockIdx.x % p.num_kv_heads;
  const int64_t token = blockIdx.x / p.num_kv_heads;
  const QueryGroup group =
      query_group(p, token / p.q_len, token % p.q_len, kv_head_idx, p.num_heads / p.num_kv_heads);
  const uint16_t* head_weights = static_cast<const uint16_t*>(p.query_weights) +
                                 int64_t{kv_head_idx} * p.head_dim * p.num_words * kWordBits;
  const int word_stride = word_weight_bytes(p.head_dim) / 2;
  if (threadIdx.x == 0) largest = 0;
  for (int first = 0; first < p.num_words; first += words_per_pass) {
    const int count = min(words_per_pass, p.num_words - first);
    __syncthreads();  // the last pass has read its weights
    for (int i = 0; i < count; ++i) {
      load_word_weights(weights + i * word_stride, head_weights, p.head_dim, p.num_words, first + i,
                        threadIdx.x, kThreads);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int tile = warp; tile < count * kWordTiles; tile += kThreads / kWarpSize) {
      const int column = tile % kWordTiles * kTileColumns;
      project_queries<T>(group, p.head_dim, p.query_bits,
                         weights + tile / kWordTiles * word_stride + column,
                         values + first * kWordBits + tile * kTileColumns, &largest);
    }
  }
  __syncthreads();
  if (warp < p.num_words) {
    const int num_planes = hata::num_planes(p.weight_sum);
    write_planes(values + warp * kWordBits, largest, p.query_bits, p.weight_sum, p.num_words,
                 p.planes + int64_t{blockIdx.x} * num_planes * p.num_words + warp);
  }
}

}  // namespace

void encode_query_cuda(const EncodeQueryParams& p, CudaStream stream) {
  const int blocks = p.batch * p.q_len * p.num_kv_heads;
  if (blocks == 0) return;
  const int words_per_pass = std::min(p.num_words, kMaxWeightBytes / word_weight_bytes(p.head_dim));
  dispatch_dtype(p.dtype, [&]<typename T>() {
    launch_kernel(encode_query_kernel<T>,
                  {.grid = dim3(blocks),
                   .threads = kThreads,
                   .shared_bytes = words_per_pass * word_weight_bytes(p.head_dim),
                   .overlaps_previous = true},
                  stream, "hata::encode_query", p, words_per_pass);
  });
}

}  // namespace hata
