#include "encode_query.h"

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "dispatch.h"
#include "query_planes.h"

namespace hata {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxHeadDim = 256;
constexpr int kPiece = 8;  // bits of one 16-byte load of weights
constexpr int kPartials = kThreads * kPiece;
static_assert(kThreads >= kMaxWords * kWordBits, "one thread a bit quantizes");

// z[v] = vectors[v] . weights[:, i] for bit i = threadIdx.x, in float32. A thread adds up eight
// neighbouring bits over every num_slices-th element; the slices are then added in order.
template <int kVectors, typename T>
__device__ void project(const float (&vectors)[kVectors][kMaxHeadDim], const T* weights,
                        int head_dim, int num_bits, float (&partial)[kVectors][kPartials],
                        float (&z)[kVectors]) {
  const int threads_per_slice = num_bits / kPiece;
  const int num_slices = kThreads / threads_per_slice;
  const int slice = threadIdx.x / threads_per_slice;
  const int bit = threadIdx.x % threads_per_slice * kPiece;
  if (slice < num_slices) {
    float sums[kVectors][kPiece] = {};
#pragma unroll 4
    for (int d = slice; d < head_dim; d += num_slices) {
      const uint4 piece = *reinterpret_cast<const uint4*>(weights + int64_t{d} * num_bits + bit);
      const uint32_t pairs[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int i = 0; i < kPiece; i += 2) {
        const float2 w = unpack(pairs[i / 2], T{});
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          sums[v][i] = fmaf(vectors[v][d], w.x, sums[v][i]);
          sums[v][i + 1] = fmaf(vectors[v][d], w.y, sums[v][i + 1]);
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) partial[v][slice * num_bits + bit + i] = sums[v][i];
    }
  }
  __syncthreads();
  if (threadIdx.x < num_bits) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      z[v] = 0.0f;
      for (int s = 0; s < num_slices; ++s) z[v] += partial[v][s * num_bits + threadIdx.x];
    }
  }
}

__device__ float block_max(float value) {
  __shared__ float warp_max[kThreads / kWarpSize];
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  if (threadIdx.x % kWarpSize == 0) warp_max[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = warp_max[0];
  for (int w = 1; w < kThreads / kWarpSize; ++w) value = fmaxf(value, warp_max[w]);
  return value;
}

// grid: batch * q_len * num_kv_heads. kVectors is 1 where the group's queries are summed first
// (query_bits 2 to 4), and otherwise how many heads are projected at a time.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads)
    encode_query_kernel(const __grid_constant__ EncodeQueryParams p) {
  __shared__ float vectors[kVectors][kMaxHeadDim];
  __shared__ float partial[kVectors][kPartials];
  wait_for_previous_kernel();
  let_next_kernel_launch();
  const int kv_head_idx = blockIdx.x % p.num_kv_heads;
  const int64_t token = blockIdx.x / p.num_kv_heads;
  const int batch_idx = token / p.q_len, j = token % p.q_len;
  const int group_size = p.num_heads / p.num_kv_heads;
  const int num_bits = p.num_words * kWordBits;
  const T* q = static_cast<const T*>(p.q) + batch_idx * p.q_batch_stride + j * p.q_token_stride +
               int64_t{kv_head_idx} * group_size * p.q_head_stride;
  const T* weights =
      static_cast<const T*>(p.query_weights) + int64_t{kv_head_idx} * p.head_dim * num_bits;

  int level = 0;
  float z[kVectors] = {};
  if constexpr (kVectors == 1) {
    for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
      float sum = 0.0f;
      for (int g = 0; g < group_size; ++g) sum += static_cast<float>(q[g * p.q_head_stride + d]);
      vectors[0][d] = sum;
    }
    __syncthreads();
    project(vectors, weights, p.head_dim, num_bits, partial, z);
    const float largest = block_max(fabsf(z[0]));
    const float m = static_cast<float>(p.weight_sum);
    const float x = largest > 0.0f ? __fmul_rn(__fdiv_rn(z[0], largest), m) : 0.0f;
    level = static_cast<int>(floorf(__fadd_rn(__fmul_rn(__fadd_rn(x, m), 0.5f), 0.5f)));
    level = min(max(level, 0), p.weight_sum);
  } else {
    for (int first = 0; first < group_size; first += kVectors) {
      __syncthreads();
      for (int i = threadIdx.x; i < kVectors * p.head_dim; i += kThreads) {
        const int v = i / p.head_dim, d = i % p.head_dim;
        vectors[v][d] = first + v < group_size
                            ? static_cast<float>(q[(first + v) * p.q_head_stride + d])
                            : 0.0f;
      }
      __syncthreads();
      project(vectors, weights, p.head_dim, num_bits, partial, z);
      for (int v = 0; v < kVectors; ++v) level += z[v] > 0.0f;
    }
  }

  if (threadIdx.x >= num_bits) return;  // whole warps: num_bits is a multiple of 32
  const unsigned bits = level_planes(level, p.weight_sum);
  const int planes = num_planes(p.weight_sum);
  uint32_t* out = p.planes + int64_t{blockIdx.x} * planes * p.num_words;
  for (int plane = 0; plane < planes; ++plane) {
    const uint32_t word = __ballot_sync(kFullMask, (bits >> plane) & 1u);
    if (threadIdx.x % kWarpSize == 0) out[plane * p.num_words + threadIdx.x / kWarpSize] = word;
  }
}

}  // namespace

void encode_query_cuda(const EncodeQueryParams& p, CudaStream stream) {
  const int blocks = p.batch * p.q_len * p.num_kv_heads;
  if (blocks == 0) return;
  dispatch_dtype(p.dtype, [&]<typename T>() {
    launch_kernel(p.query_bits == 1 ? encode_query_kernel<T, 2> : encode_query_kernel<T, 1>,
                  {.grid = dim3(blocks), .threads = kThreads, .overlaps_previous = true}, stream,
                  "hata::encode_query", p);
  });
}

}  // namespace hata
