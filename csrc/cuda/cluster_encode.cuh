#pragma once

#include "cuda/append_slot.cuh"
#include "cuda/encode_planes.cuh"

// What the blocks of a cluster do before they scan: each encodes the queries of its KV head for
// itself, and between them they append the new tokens.
namespace hata {

// Words of a new token's code that a block of the cluster encodes: rank, rank + num_blocks, ...
struct ClusterShare {
  int rank, num_blocks;

  __device__ int num_key_words(int num_words) const {
    return rank < num_words ? (num_words - 1 - rank) / num_blocks + 1 : 0;
  }
};

// One word of the codes of the new tokens, at most eight, of one sequence and KV head. keys[0] is
// the first token's.
template <typename T>
__device__ void append_code_word(const CacheAppendParams& p, int batch_idx, int kv_head_idx,
                                 int word, const uint16_t* keys, int64_t key_stride,
                                 const uint16_t* weights) {
  const int lane = threadIdx.x % kWarpSize;
  const int token = lane / 4;
  float sums[4][4] = {};
  project_rows<T>(sums, token < p.q_len ? keys + token * key_stride : nullptr, p.cache.head_dim,
                  weights);
  const uint32_t code = sign_words(sums).x;
  const Slot slot = slot_of(p, batch_idx, token);
  if (lane % 4 == 0 && slot.row >= 0) code_at(p.code_cache, slot, kv_head_idx)[word] = code;
}

// Key, value and norm of one new token, by a warp.
template <typename T>
__device__ void append_row(const CacheAppendParams& p, int batch_idx, int kv_head_idx, int token) {
  const int lane = threadIdx.x % kWarpSize;
  const Slot slot = slot_of(p, batch_idx, token);
  if (slot.row < 0) return;
  // Lane 4 s + c holds the elements of step s that thread c of a quad has elsewhere.
  const int d = lane * 8, num_steps = p.cache.head_dim / 32;
  uint4 piece = {};
  if (d < p.cache.head_dim) {
    const auto* v = static_cast<const T*>(p.v) + batch_idx * p.v_batch_stride +
                    token * p.v_token_stride + kv_head_idx * p.v_head_stride;
    T* v_row = cache_row<T>(p.cache.v, p.cache.v_page_stride, p.cache.v_token_stride,
                            p.cache.v_head_stride, slot, kv_head_idx);
    *reinterpret_cast<uint4*>(v_row + d) = *reinterpret_cast<const uint4*>(v + d);
    const auto* k = static_cast<const T*>(p.k) + batch_idx * p.k_batch_stride +
                    token * p.k_token_stride + kv_head_idx * p.k_head_stride;
    T* k_row = cache_row<T>(p.cache.k, p.cache.k_page_stride, p.cache.k_token_stride,
                            p.cache.k_head_stride, slot, kv_head_idx);
    piece = *reinterpret_cast<const uint4*>(k + d);
    *reinterpret_cast<uint4*>(k_row + d) = piece;
  }
  if (p.code_cache.norms == nullptr) return;
  const float squares = sum_of_squares<T>(piece);
  float sum = 0.0f;
  for (int step = 0; step < num_steps; ++step) {
    sum += __shfl_sync(kFullMask, squares, step * 4 + lane % 4);
  }
  const uint16_t norm = norm_of_quad(sum);
  if (lane == 0) *norm_at(p.code_cache, slot, kv_head_idx) = norm;
}

// Shared memory of a block for vectors and hash weights while it encodes, and how it is laid out:
// where they fit, the queries of the group and the new keys as rows of row_pitch elements, then the
// weights of per_pass words.
struct EncodeScratch {
  uint16_t* rows;  // [q_len * group + q_len, row_pitch]: queries, then keys; null: do not fit
  int row_pitch;
  uint16_t* weights;  // [per_pass, head_dim, kWeightPitch]
  int per_pass;

  __device__ EncodeScratch(char* memory, int bytes, const EncodeQueryParams& p, int group) {
    constexpr int kMostRowBytes = 24 * 1024;
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
  ClusterShare share;

  // Words to load, those of the queries, then this block's of the keys.
  __device__ int num_loads() const {
    return encode.num_words + share.num_key_words(encode.num_words);
  }
  __device__ bool is_query(int load) const { return load < encode.num_words; }
  __device__ int word(int load) const {
    return is_query(load) ? load : share.rank + (load - encode.num_words) * share.num_blocks;
  }
  __device__ QueryGroup queries(int j) const {
    return query_group(encode, batch_idx, j, kv_head_idx, group);
  }
  __device__ const uint16_t* key(int j) const {
    return static_cast<const uint16_t*>(append.k) + batch_idx * append.k_batch_stride +
           j * append.k_token_stride + kv_head_idx * append.k_head_stride;
  }
};

// Starts the copies of the weights of one pass, by a whole block.
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

// Starts what encode_and_append() waits for first, so that it is under way early.
__device__ inline void start_encoding(const EncodeTask& task, const EncodeScratch& scratch) {
  const EncodeQueryParams& p = task.encode;
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
      if (d < p.head_dim) cp_async_16(scratch.rows + row * scratch.row_pitch + d, from + d, true);
    }
  }
  load_pass(task, scratch, 0);
  cp_async_commit();
}

// By a whole block: writes the planes of all query tokens to `planes` [q_len, plane_pitch] in
// shared memory, adds their ScanPlanes::base to `bases` [q_len], and writes this block's share of
// the new tokens to the caches. values [q_len, num_bits] and largest [q_len], zero, are scratch in
// shared memory. Not inlined: its registers are not the scan's.
template <typename T>
__device__ __noinline__ void encode_and_append(const EncodeTask& task, const EncodeScratch& scratch,
                                               float* values, uint32_t* largest, int* bases,
                                               uint32_t* planes, int plane_pitch) {
  const EncodeQueryParams& p = task.encode;
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int word_stride = word_weight_bytes(p.head_dim) / 2;
  // Keys and values by the last warps of the last block, which have the least to project.
  if (task.share.rank == task.share.num_blocks - 1) {
    const int token = num_warps - 1 - warp;
    if (token < p.q_len) {
      append_row<T>(task.append, task.batch_idx, task.kv_head_idx, token);
    }
  }
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
    for (int i = warp; i < count * p.q_len; i += num_warps) {
      const int load = first + i / p.q_len, j = i % p.q_len;
      const uint16_t* weights = scratch.weights + i / p.q_len * word_stride;
      if (task.is_query(load)) {
        QueryGroup queries = task.queries(j);
        if (scratch.rows != nullptr) {
          queries.heads = scratch.rows + j * task.group * scratch.row_pitch;
          queries.head_stride = scratch.row_pitch;
        }
        project_queries<T>(queries, p.head_dim, p.query_bits, weights,
                           values + (j * p.num_words + load) * kWordBits, largest + j);
      } else if (j == 0) {
        const bool staged = scratch.rows != nullptr;
        append_code_word<T>(
            task.append, task.batch_idx, task.kv_head_idx, task.word(load),
            staged ? scratch.rows + p.q_len * task.group * scratch.row_pitch : task.key(0),
            staged ? scratch.row_pitch : task.append.k_token_stride, weights);
      }
    }
  }
  __syncthreads();
  for (int i = warp; i < p.q_len * p.num_words; i += num_warps) {
    const int j = i / p.num_words, word = i % p.num_words;
    const int base = write_planes(values + i * kWordBits, largest[j], p.query_bits, p.weight_sum,
                                  p.num_words, planes + j * plane_pitch + word);
    if (threadIdx.x % kWarpSize == 0) atomicAdd(bases + j, base);
  }
}

}  // namespace hata
