#pragma once

#include "cuda/cluster_append.cuh"
#include "cuda/encode_planes.cuh"

// What the blocks of a cluster do before they scan: each encodes the queries of its KV head for
// itself, and between them they append the new tokens.
namespace hata {

// The signs of q_len vectors, at most eight, in the kTileColumns columns from `weights` on: those
// of vector t go to bits[t * kMaxWords * 4], a byte.
template <typename T>
__device__ void encode_tile(const uint16_t* vectors, int64_t stride, int q_len, int head_dim,
                            const uint16_t* weights, uint8_t* bits) {
  static_assert(kTileColumns == 8 && kMaxClusterTokens == 8);
  const int lane = threadIdx.x % kWarpSize;
  const int token = lane / 4;
  float sums[4] = {};
  project_tile<T>(sums, token < q_len ? vectors + token * stride : nullptr, head_dim, weights);
  uint32_t mine =
      (static_cast<uint32_t>(sums[0] > 0.0f) | static_cast<uint32_t>(sums[1] > 0.0f) << 1)
      << lane % 4 * 2;
  mine |= __shfl_xor_sync(kFullMask, mine, 1);
  mine |= __shfl_xor_sync(kFullMask, mine, 2);
  if (lane % 4 == 0 && token < q_len) bits[token * kMaxWords * 4] = mine;
}

// Shared memory of a block for vectors and hash weights while it encodes, and how it is laid out:
// projections; where they fit, the queries of the group and the new keys as rows of row_pitch
// elements; then the weights of per_pass words.
struct EncodeScratch {
  float* values;   // [q_len, num_bits]
  uint16_t* rows;  // [q_len * group + q_len, row_pitch]: queries, then keys; null: do not fit
  int row_pitch;
  uint16_t* weights;  // [per_pass, head_dim, kWeightPitch]
  int per_pass;

  __device__ EncodeScratch(char* memory, int bytes, const EncodeQueryParams& p, int group) {
    constexpr int kMostRowBytes = 24 * 1024;
    values = reinterpret_cast<float*>(memory);
    const int value_bytes = p.q_len * p.num_words * kWordBits * 4;
    memory += value_bytes, bytes -= value_bytes;
    row_pitch = p.head_dim + 8;  // 16 bytes more: no bank conflicts
    const int row_bytes = p.q_len * (group + 1) * row_pitch * 2;
    rows = row_bytes <= kMostRowBytes ? reinterpret_cast<uint16_t*>(memory) : nullptr;
    weights = reinterpret_cast<uint16_t*>(memory + (rows != nullptr ? row_bytes : 0));
    // Made, but not used, where nothing is encoded: head_dim is 0 then.
    per_pass = (bytes - (rows != nullptr ? row_bytes : 0)) / max(word_weight_bytes(p.head_dim), 1);
  }
};

// What a block encodes: the queries of its (sequence, KV head), and its share of the new keys.
struct EncodeTask {
  const EncodeQueryParams& encode;
  const CacheAppendParams& append;
  int batch_idx, kv_head_idx;
  int group;  // query heads of the KV head
  ClusterPlace place;

  // Words to load, those of the queries, then this block's of the keys.
  __device__ int num_loads() const {
    return encode.num_words + num_own_words(place, encode.num_words);
  }
  __device__ bool is_query(int load) const { return load < encode.num_words; }
  __device__ int word(int load) const {
    return is_query(load) ? load : place.rank + (load - encode.num_words) * place.num_blocks;
  }
  __device__ QueryGroup queries(int j) const {
    return query_group(encode, batch_idx, j, kv_head_idx, group);
  }
  __device__ const uint16_t* key(int j) const {
    return static_cast<const uint16_t*>(append.k) + batch_idx * append.k_batch_stride +
           j * append.k_token_stride + kv_head_idx * append.k_head_stride;
  }
};

// Starts the copies of the weights of one pass, by a whole block. The caller commits and waits.
__device__ inline void load_pass(const EncodeTask& task, const EncodeScratch& scratch, int first) {
  const EncodeQueryParams& p = task.encode;
  const int64_t head_offset = int64_t{task.kv_head_idx} * p.head_dim * p.num_words * kWordBits;
  const int count = min(scratch.per_pass, task.num_loads() - first);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const void* weights = task.is_query(first + i) ? p.query_weights : task.append.key_weights;
    load_word_weights(scratch.weights + i * (word_weight_bytes(p.head_dim) / 2),
                      static_cast<const uint16_t*>(weights) + head_offset, p.head_dim, p.num_words,
                      task.word(first + i), threadIdx.x, blockDim.x);
  }
}

// Starts the copies of queries and of new keys and values, by a whole block, and commits them with
// what was started before. `kept`, if not null, is given the queries a second time.
__device__ inline void load_rows(const EncodeTask& task, const EncodeScratch& scratch,
                                 NewRows& new_rows, uint16_t* kept) {
  const EncodeQueryParams& p = task.encode;
  load_new_rows(task.append, task.batch_idx, task.kv_head_idx, new_rows);
  if (scratch.rows != nullptr) {
    const int num_queries = p.q_len * task.group;
    const int num_warps = blockDim.x / kWarpSize, d = threadIdx.x % kWarpSize * 8;
#pragma unroll 1
    for (int row = threadIdx.x / kWarpSize; row < num_queries + p.q_len; row += num_warps) {
      const uint16_t* from = task.key(row - num_queries);
      if (row < num_queries) {
        const QueryGroup queries = task.queries(row / task.group);
        from = queries.heads + row % task.group * queries.head_stride;
      }
      if (d >= p.head_dim) continue;
      cp_async_16(scratch.rows + row * scratch.row_pitch + d, from + d, true);
      if (kept != nullptr && row < num_queries) {
        cp_async_16(kept + row * scratch.row_pitch + d, from + d, true);
      }
    }
  }
  cp_async_commit();
}

// By a whole block: writes the planes of all query tokens to `planes` [q_len, plane_pitch] in
// shared memory, adds their ScanPlanes::base to `bases` [q_len], and writes this block's share of
// the new tokens' codes, and where they go, to `new_tokens`. largest [q_len], zero, is scratch in
// shared memory. load_pass() of the first weights and load_rows() were called before.
template <typename T>
__device__ __forceinline__ void encode(const EncodeTask& task, const EncodeScratch& scratch,
                                       uint32_t* largest, int* bases, uint32_t* planes,
                                       int plane_pitch, NewTokens& new_tokens) {
  const EncodeQueryParams& p = task.encode;
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int word_stride = word_weight_bytes(p.head_dim) / 2;
  const int num_loads = task.num_loads();
  for (int first = 0; first < num_loads; first += scratch.per_pass) {
    if (first > 0) {
      __syncthreads();  // the last pass has read its weights
      load_pass(task, scratch, first);
      cp_async_commit();
    }
    cp_async_wait<0>();
    __syncthreads();
    const int count = min(scratch.per_pass, num_loads - first);
    const bool staged = scratch.rows != nullptr;
#pragma unroll 1
    for (int i = warp; i < count * kWordTiles * p.q_len; i += num_warps) {
      const int j = i / (count * kWordTiles), tile = i % (count * kWordTiles);
      const int load = first + tile / kWordTiles, column = tile % kWordTiles * kTileColumns;
      const uint16_t* weights = scratch.weights + tile / kWordTiles * word_stride + column;
      if (task.is_query(load)) {
        const QueryGroup queries =
            staged ? QueryGroup{scratch.rows + j * task.group * scratch.row_pitch, task.group,
                                scratch.row_pitch}
                   : task.queries(j);
        project_queries<T>(queries, p.head_dim, p.query_bits, weights,
                           scratch.values + (j * p.num_words + load) * kWordBits + column,
                           largest + j);
      } else if (j == 0) {
        encode_tile<T>(
            staged ? scratch.rows + p.q_len * task.group * scratch.row_pitch : task.key(0),
            staged ? scratch.row_pitch : task.append.k_token_stride, p.q_len, p.head_dim, weights,
            reinterpret_cast<uint8_t*>(new_tokens.codes[0] + task.word(load)) +
                column / kTileColumns);
      }
    }
  }
  // By the last warps, which have the least to project.
  find_slots(task.append, task.batch_idx, new_tokens);
  __syncthreads();
  for (int i = warp; i < p.q_len * p.num_words; i += num_warps) {
    const int j = i / p.num_words, word = i % p.num_words;
    const int base = write_planes(scratch.values + i * kWordBits, largest[j], p.query_bits,
                                  p.weight_sum, p.num_words, planes + j * plane_pitch + word);
    if (threadIdx.x % kWarpSize == 0) atomicAdd(bases + j, base);
  }
}

}  // namespace hata
