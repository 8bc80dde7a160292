#include "hamming_score.h"

#include "cuda/codes/matches.cuh"
#include "cuda/primitives/check.h"
#include "dispatch.h"
#include "selection.h"

namespace hata {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxTokens = 8;  // query tokens whose planes are in shared memory at a time

// Units that a thread scores at a time: as many as fit its registers.
constexpr int units_per_thread(int num_words) {
  return num_words >= 2 && num_words <= 4 ? 2 : 1;
}
template <int kNumWords>
constexpr int positions_per_block() {
  return kThreads * units_per_thread(kNumWords) * CodeUnit<kNumWords>::kTokens;
}

template <int kNumWords>
__device__ void store(const HammingScoreParams& p, int64_t i, int matches, uint16_t norm) {
  constexpr int kNumBits = kNumWords * kWordBits;
  switch (p.kind) {
    case ScoreKind::kInt32:
      static_cast<int32_t*>(p.scores)[i] = score_of_matches(matches, p.weight_sum * kNumBits);
      break;
    case ScoreKind::kFloat16:
      static_cast<uint16_t*>(p.scores)[i] = float16_score<kNumBits>(matches, p.weight_sum, norm);
      break;
    case ScoreKind::kRank16:
      static_cast<uint16_t*>(p.scores)[i] =
          p.code_cache.norms == nullptr
              ? static_cast<uint16_t>(matches)
              : ordered_rank_float16(float16_score<kNumBits>(matches, p.weight_sum, norm));
      break;
  }
}

__device__ void store_invisible(const HammingScoreParams& p, int64_t i) {
  if (p.kind == ScoreKind::kInt32) static_cast<int32_t*>(p.scores)[i] = kLowestScore<int32_t>;
  if (p.kind == ScoreKind::kFloat16) {
    static_cast<uint16_t*>(p.scores)[i] = kLowestScore<uint16_t>;
  }
}

// The planes of query tokens first_token.. of one (sequence, KV head), in shared memory.
template <int kNumWords>
struct SharedPlanes {
  PlaneWeights weights;
  alignas(8) uint32_t planes[kMaxTokens][kMaxPlanes * kNumWords];
  alignas(8) uint32_t zeros[kMaxPlanes * kNumWords];
  int bases[kMaxTokens];
};

// Writes the scores of one chunk for these query tokens.
template <int kNumWords, bool kNorms, int kUnits>
__device__ __forceinline__ void score_chunk(const HammingScoreParams& p, int batch_idx,
                                            int kv_head_idx, const SharedPlanes<kNumWords>& planes,
                                            int first_token,
                                            const CodeChunk<kNumWords, kNorms, kUnits>& chunk,
                                            int first_position) {
  constexpr int kTokens = CodeUnit<kNumWords>::kTokens;
  const int seq_len = seq_len_of(p.table, batch_idx);
  const int num_planes = hata::num_planes(p.weight_sum);
  int offsets[kUnits * kTokens];
  offset_matches(chunk.units, num_planes, p.weight_sum, offsets);
  for (int t = 0; t < min(kMaxTokens, p.q_len - first_token); ++t) {
    const int j = first_token + t;
    const int visible = min(visible_len(seq_len, p.q_len, j), p.max_seq_len);
    const int64_t row = (int64_t{batch_idx} * p.q_len + j) * p.num_kv_heads + kv_head_idx;
    int matches[kUnits * kTokens];
    count_matches(chunk.units, offsets,
                  {plane_column<kNumWords>(planes.planes[t], planes.zeros), planes.weights,
                   num_planes, planes.bases[t]},
                  matches);
#pragma unroll
    for (int i = 0; i < kUnits * kTokens; ++i) {
      const int position = chunk.position_of(first_position, i / kTokens) + i % kTokens;
      if (position >= p.max_seq_len) continue;
      uint16_t norm = 0;
      if constexpr (kNorms) norm = static_cast<uint16_t>(chunk.norms[i / 2] >> i % 2 * 16);
      if (position < visible) {
        store<kNumWords>(p, row * p.max_seq_len + position, matches[i], norm);
      } else {
        store_invisible(p, row * p.max_seq_len + position);
      }
    }
  }
}

// grid: batch * num_kv_heads * blocks of positions_per_block positions, a chunk a warp. The block
// shares the planes of the query tokens.
template <int kNumWords, bool kNorms>
__global__ void __launch_bounds__(kThreads, 1)
    hamming_score_kernel(const __grid_constant__ HammingScoreParams p, int blocks_per_pair) {
  using Chunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords)>;
  using Part = CodeChunk<kNumWords, kNorms, 1>;
  __shared__ SharedPlanes<kNumWords> planes;
  const int pair = blockIdx.x / blocks_per_pair;
  const int batch_idx = pair / p.num_kv_heads, kv_head_idx = pair % p.num_kv_heads;
  const int block_position = blockIdx.x % blocks_per_pair * positions_per_block<kNumWords>();
  const int seq_len = min(seq_len_of(p.table, batch_idx), p.max_seq_len);
  if (p.kind == ScoreKind::kRank16 && block_position >= seq_len) return;

  const CodeReader<kNumWords> reader(p.table, p.code_cache, batch_idx, kv_head_idx,
                                     only_page(p.table, batch_idx));
  const int token_words = num_planes(p.weight_sum) * kNumWords;
  const int warp = threadIdx.x / kWarpSize;
  const int first = block_position + warp * Chunk::kPositions;
  planes.weights.set(p.weight_sum, threadIdx.x);
  if (threadIdx.x < kMaxPlanes * kNumWords) planes.zeros[threadIdx.x] = 0;
  for (int token = 0; token < p.q_len; token += kMaxTokens) {
    const int num_tokens = min(kMaxTokens, p.q_len - token);
    __syncthreads();
    for (int i = threadIdx.x; i < num_tokens * token_words; i += kThreads) {
      const int t = i / token_words, word = i % token_words;
      const int64_t row = (int64_t{batch_idx} * p.q_len + token + t) * p.num_kv_heads + kv_head_idx;
      planes.planes[t][word] = p.planes[row * token_words + word];
    }
    if (threadIdx.x < num_tokens) {
      add_ones(planes.planes[threadIdx.x], num_planes(p.weight_sum), kNumWords, 0, 1);
    }
    __syncthreads();
    static_assert(kMaxTokens <= kThreads / kWarpSize);
    if (warp < num_tokens) {
      planes.bases[warp] = plane_base<kNumWords>(planes.planes[warp], p.weight_sum);
    }
    __syncthreads();
    if (reader.has_whole_units() && first + Chunk::kPositions <= seq_len) {
      Chunk chunk;
      reader.load_whole(chunk, first);
      score_chunk(p, batch_idx, kv_head_idx, planes, token, chunk, first);
    } else {
#pragma unroll 1
      for (int part = first; part < min(first + Chunk::kPositions, p.max_seq_len);
           part += Part::kPositions) {
        Part chunk;
        reader.load_part(chunk, part, seq_len);
        score_chunk(p, batch_idx, kv_head_idx, planes, token, chunk, part);
      }
    }
  }
}

}  // namespace

void hamming_score_cuda(const HammingScoreParams& p, CudaStream stream) {
  dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>("num_words", p.code_cache.num_words, [&](auto num_words) {
    const int blocks_per_pair = ceil_div(p.max_seq_len, positions_per_block<num_words>());
    const int64_t blocks = int64_t{p.table.batch} * p.num_kv_heads * blocks_per_pair;
    if (blocks == 0 || p.q_len == 0) return;
    const auto kernel = p.code_cache.norms != nullptr ? hamming_score_kernel<num_words, true>
                                                      : hamming_score_kernel<num_words, false>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, blocks_per_pair);
    cuda_check(cudaGetLastError(), "hata::hamming_score");
  });
}

}  // namespace hata
