#include "hamming_score.h"

#include "cuda/check.h"
#include "cuda/code_scan.cuh"
#include "dispatch.h"

namespace hata {
namespace {

constexpr int kThreads = 256;

// Codes in flight a thread: as many as fit its registers.
constexpr int tokens_per_thread(int num_words) {
  return num_words <= 4 ? 4 : 2;
}
constexpr int tokens_per_block(int num_words) {
  return kThreads * tokens_per_thread(num_words);
}

constexpr int kMaxTokens = 8;  // query tokens whose planes are in shared memory at a time

template <int kNumWords>
__device__ void store(const HammingScoreParams& p, int64_t i, int matches, uint16_t norm) {
  constexpr int kNumBits = kNumWords * kWordBits;
  switch (p.kind) {
    case ScoreKind::kInt32:
      static_cast<int32_t*>(p.scores)[i] = 2 * matches - p.weight_sum * kNumBits;
      break;
    case ScoreKind::kFloat16:
      static_cast<uint16_t*>(p.scores)[i] = float16_score<kNumBits>(matches, p.weight_sum, norm);
      break;
    case ScoreKind::kKey16:
      static_cast<uint16_t*>(p.scores)[i] =
          p.code_cache.norms == nullptr
              ? static_cast<uint16_t>(matches)
              : ordered_key_float16(float16_score<kNumBits>(matches, p.weight_sum, norm));
      break;
  }
}

__device__ void store_invisible(const HammingScoreParams& p, int64_t i) {
  if (p.kind == ScoreKind::kInt32) static_cast<int32_t*>(p.scores)[i] = INT32_MIN;
  if (p.kind == ScoreKind::kFloat16) static_cast<uint16_t*>(p.scores)[i] = 0xfc00;  // -infinity
}

// grid: batch * num_kv_heads * chunks of tokens_per_block positions. A thread keeps the codes of
// its positions in registers and scores them for every query token, whose planes the block shares.
template <int kNumWords>
__global__ void __launch_bounds__(kThreads)
    hamming_score_kernel(const __grid_constant__ HammingScoreParams p, int chunks) {
  constexpr int kTokensPerThread = tokens_per_thread(kNumWords);
  __shared__ uint32_t planes[kMaxTokens * kMaxPlanes * kNumWords];
  const int pair = blockIdx.x / chunks;
  const int batch_idx = pair / p.num_kv_heads, kv_head_idx = pair % p.num_kv_heads;
  const int first_position = blockIdx.x % chunks * tokens_per_block(kNumWords);
  const int seq_len = min(seq_len_of(p.table, batch_idx), p.max_seq_len);
  if (p.kind == ScoreKind::kKey16 && first_position >= seq_len) return;

  Code<kNumWords> codes[kTokensPerThread];
  uint16_t norms[kTokensPerThread] = {};
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int position = first_position + i * kThreads + threadIdx.x;
    codes[i] = {};
    if (position >= seq_len) continue;
    const int page = page_of(p.table, batch_idx, position);
    if (page < 0) continue;
    const int row = row_of(p.table, position);
    codes[i] = load_code<kNumWords>(p.code_cache.codes + page * p.code_cache.code_page_stride +
                                    kv_head_idx * p.code_cache.code_head_stride +
                                    int64_t{row} * kNumWords);
    if (p.code_cache.norms != nullptr) {
      norms[i] = p.code_cache.norms[page * p.code_cache.norm_page_stride +
                                    kv_head_idx * p.code_cache.norm_head_stride + row];
    }
  }

  const int num_planes = hata::num_planes(p.weight_sum);
  const int token_words = num_planes * kNumWords;
  for (int first = 0; first < p.q_len; first += kMaxTokens) {
    const int tokens = min(kMaxTokens, p.q_len - first);
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * token_words; i += kThreads) {
      const int64_t row =
          (int64_t{batch_idx} * p.q_len + first + i / token_words) * p.num_kv_heads + kv_head_idx;
      planes[i] = p.planes[row * token_words + i % token_words];
    }
    __syncthreads();
    for (int t = 0; t < tokens; ++t) {
      const int j = first + t;
      const int visible = min(visible_len(seq_len_of(p.table, batch_idx), p.q_len, j), seq_len);
      const int64_t row = (int64_t{batch_idx} * p.q_len + j) * p.num_kv_heads + kv_head_idx;
      int matches[kTokensPerThread];
      count_matches(codes, planes + t * token_words, num_planes, p.weight_sum, matches);
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        const int position = first_position + i * kThreads + threadIdx.x;
        if (position >= p.max_seq_len) continue;
        if (position < visible) {
          store<kNumWords>(p, row * p.max_seq_len + position, matches[i], norms[i]);
        } else {
          store_invisible(p, row * p.max_seq_len + position);
        }
      }
    }
  }
}

}  // namespace

void hamming_score_cuda(const HammingScoreParams& p, CudaStream stream) {
  const int chunks = ceil_div(p.max_seq_len, tokens_per_block(p.code_cache.num_words));
  const int64_t blocks = int64_t{p.table.batch} * p.num_kv_heads * chunks;
  if (blocks == 0 || p.q_len == 0) return;
  dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>("num_words", p.code_cache.num_words, [&](auto num_words) {
    hamming_score_kernel<num_words>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, chunks);
    cuda_check(cudaGetLastError(), "hata::hamming_score");
  });
}

}  // namespace hata
