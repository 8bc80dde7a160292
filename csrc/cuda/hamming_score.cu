#include "hamming_score.h"

#include <algorithm>

#include "cuda/codes/matches.cuh"
#include "cuda/primitives/check.h"
#include "dispatch.h"
#include "selection.h"

namespace hata {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxTokens = 8;  // query tokens whose planes are in shared memory at a time
// A dozen blocks for each of an H100's 132 multiprocessors: few, because each reads the planes
// before its first codes, and enough to share sequences of unequal length evenly.
constexpr int kTargetBlocks = 12 * 132;

// Units that a thread scores at a time: as many as fit its registers.
constexpr int units_per_thread(int num_words) {
  return num_words >= 2 && num_words <= 4 ? 2 : 1;
}
// Blocks of a multiprocessor at least, as many as have enough registers.
constexpr int min_blocks(int num_words) {
  return num_words <= 2 ? 3 : 2;
}
template <int kNumWords>
constexpr int positions_per_block() {
  return kThreads * units_per_thread(kNumWords) * CodeUnit<kNumWords>::kTokens;
}

template <int kNumWords, bool kNorms>
__device__ uint16_t rank_of(const HammingScoreParams& p, int matches, uint16_t norm) {
  constexpr int kNumBits = kNumWords * kWordBits;
  if constexpr (!kNorms) return static_cast<uint16_t>(matches);
  return ordered_rank_float16(float16_score<kNumBits>(matches, p.weight_sum, norm));
}

template <int kNumWords>
__device__ void store(const HammingScoreParams& p, int64_t i, int matches, uint16_t norm) {
  constexpr int kNumBits = kNumWords * kWordBits;
  if (p.kind == ScoreKind::kInt32) {
    static_cast<int32_t*>(p.scores)[i] = score_of_matches(matches, p.weight_sum * kNumBits);
  } else {
    static_cast<uint16_t*>(p.scores)[i] = float16_score<kNumBits>(matches, p.weight_sum, norm);
  }
}

__device__ void store_invisible(const HammingScoreParams& p, int64_t i) {
  if (p.kind == ScoreKind::kInt32) {
    static_cast<int32_t*>(p.scores)[i] = kLowestScore<int32_t>;
  } else {
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
    const auto norm_of = [&](int i) -> uint16_t {
      return kNorms ? static_cast<uint16_t>(chunk.norms[i / 2] >> i % 2 * 16) : 0;
    };
#pragma unroll
    for (int i = 0; i < kUnits * kTokens; i += 2) {
      const int position = chunk.position_of(first_position, i / kTokens) + i % kTokens;
      if (p.kind == ScoreKind::kRank16) {
        // Lists are an even number of ranks long.
        if (position >= visible) continue;
        const uint32_t low = rank_of<kNumWords, kNorms>(p, matches[i], norm_of(i));
        const uint32_t high = rank_of<kNumWords, kNorms>(p, matches[i + 1], norm_of(i + 1));
        static_cast<uint32_t*>(p.scores)[(row * p.max_seq_len + position) / 2] = high << 16 | low;
        continue;
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int64_t place = row * p.max_seq_len + position + k;
        if (position + k < visible) {
          store<kNumWords>(p, place, matches[i + k], norm_of(i + k));
        } else if (position + k < p.max_seq_len) {
          store_invisible(p, place);
        }
      }
    }
  }
}

// grid: batch * num_kv_heads * blocks_per_pair. A block takes every blocks_per_pair-th run of
// positions_per_block positions, a chunk a warp, and shares the planes of the query tokens. The
// codes of the next run, and of the first while the planes are read, are brought into L2.
template <int kNumWords, bool kNorms>
__global__ void __launch_bounds__(kThreads, min_blocks(kNumWords))
    hamming_score_kernel(const __grid_constant__ HammingScoreParams p, int blocks_per_pair) {
  using Chunk = CodeChunk<kNumWords, kNorms, units_per_thread(kNumWords)>;
  using Part = CodeChunk<kNumWords, kNorms, 1>;
  __shared__ SharedPlanes<kNumWords> planes;
  const int pair = blockIdx.x / blocks_per_pair;
  const int batch_idx = pair / p.num_kv_heads, kv_head_idx = pair % p.num_kv_heads;
  const int block_position = blockIdx.x % blocks_per_pair * positions_per_block<kNumWords>();
  const int seq_len = min(seq_len_of(p.table, batch_idx), p.max_seq_len);
  const int end = p.kind == ScoreKind::kRank16 ? seq_len : p.max_seq_len;
  if (block_position >= end) return;

  const CodeReader<kNumWords> reader(p.table, p.code_cache, batch_idx, kv_head_idx,
                                     only_page(p.table, batch_idx));
  const int token_words = num_planes(p.weight_sum) * kNumWords;
  const int warp = threadIdx.x / kWarpSize;
  const int warp_position = block_position + warp * Chunk::kPositions;
  const int stride = blocks_per_pair * positions_per_block<kNumWords>();
  reader.template prefetch<kNorms, Chunk::kPositions>(warp_position, seq_len);
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
#pragma unroll 1
    for (int first = warp_position; first < end;) {
      const bool is_last = first >= end - stride;
      if (!is_last) {
        reader.template prefetch<kNorms, Chunk::kPositions>(first + stride, seq_len);
      }
      if (reader.has_whole_units() && first <= seq_len - Chunk::kPositions) {
        Chunk chunk;
        reader.load_whole(chunk, first);
        score_chunk(p, batch_idx, kv_head_idx, planes, token, chunk, first);
      } else {
#pragma unroll 1
        for (int part = first; part < min(first + Chunk::kPositions, end);
             part += Part::kPositions) {
          Part chunk;
          reader.load_part(chunk, part, seq_len);
          score_chunk(p, batch_idx, kv_head_idx, planes, token, chunk, part);
        }
      }
      if (is_last) break;  // positions go up to the largest int
      first += stride;
    }
  }
}

}  // namespace

void hamming_score_cuda(const HammingScoreParams& p, CudaStream stream) {
  dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>("num_words", p.code_cache.num_words, [&](auto num_words) {
    const int64_t pairs = int64_t{p.table.batch} * p.num_kv_heads;
    if (pairs == 0 || p.q_len == 0 || p.max_seq_len == 0) return;
    const int runs = ceil_div(p.max_seq_len, positions_per_block<num_words>());
    const int64_t wanted = std::clamp<int64_t>(kTargetBlocks / pairs, 1, runs);
    const int runs_per_block = ceil_div(runs, static_cast<int>(wanted));
    const int blocks_per_pair = ceil_div(runs, runs_per_block);
    const auto kernel = p.code_cache.norms != nullptr ? hamming_score_kernel<num_words, true>
                                                      : hamming_score_kernel<num_words, false>;
    kernel<<<static_cast<unsigned>(pairs * blocks_per_pair), kThreads, 0, stream>>>(
        p, blocks_per_pair);
    cuda_check(cudaGetLastError(), "hata::hamming_score");
  });
}

}  // namespace hata
