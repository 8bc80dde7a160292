#pragma once

#include "cuda/append_slot.cuh"
#include "cuda/codes/encode_planes.cuh"
#include "cuda/codes/token_sums.cuh"
#include "cuda/decode_step/plan.cuh"
#include "cuda/primitives/cp_async.cuh"
#include "cuda/primitives/float8.cuh"

// The first phase. Each block of a cluster encodes the queries of its KV head for itself, and
// between them they encode and append the new tokens: the words of their codes are spread over the
// blocks, and keys and values are written by the block in whose slice they lie. What is appended is
// fetched while the queries are encoded, and written when nobody waits for it: while the cluster
// looks for the cut.
namespace hata::step {

// How many words of a new token's code this block encodes: words block, block + num_blocks, ...
__device__ __forceinline__ int num_own_words(const Place& place, int num_words) {
  return place.block < num_words ? (num_words - 1 - place.block) / place.num_blocks + 1 : 0;
}

// The new token that this warp appends: the block's last warps, which have the least to project,
// have one each. Not below q_len for the others.
__device__ __forceinline__ int token_of_warp() {
  return static_cast<int>(blockDim.x - 1 - threadIdx.x) / kWarpSize;
}

// Starts the copies of the new keys and values to shared memory, by a whole block.
__device__ inline void load_new_rows(const CacheAppendParams& p, int batch_idx, int kv_head_idx,
                                     NewRows& rows) {
  const int token = token_of_warp(), d = threadIdx.x % kWarpSize * 8;
  if (token >= p.q_len || d >= p.cache.head_dim) return;
  cp_async_16(rows.k[token] + d,
              static_cast<const uint16_t*>(p.k) + batch_idx * p.k_batch_stride +
                  token * p.k_token_stride + kv_head_idx * p.k_head_stride + d,
              true);
  cp_async_16(rows.v[token] + d,
              static_cast<const uint16_t*>(p.v) + batch_idx * p.v_batch_stride +
                  token * p.v_token_stride + kv_head_idx * p.v_head_stride + d,
              true);
}

// Looks up where the new tokens go, by a whole block.
__device__ inline void find_slots(const CacheAppendParams& p, int batch_idx, NewTokens& tokens) {
  const int token = token_of_warp();
  if (token < p.q_len && threadIdx.x % kWarpSize == 0) {
    tokens.positions[token] = append_position(p.table, p.new_seqlens, p.q_len, batch_idx, token);
    tokens.slots[token] = slot_of(p, batch_idx, token);
  }
}

// Encodes q_len vectors, at most eight, by one warp: the signs of vector t in the kTileColumns
// columns from `weights` on go to bits[t * kMaxWords * 4], a byte.
template <typename T>
__device__ void encode_tile(const uint16_t* vectors, int64_t stride, int q_len, int head_dim,
                            const uint16_t* weights, uint8_t* bits) {
  static_assert(kTileColumns == 8 && kMaxTokens == 8);
  const int lane = threadIdx.x % kWarpSize;
  const int token = lane / 4;
  float sums[4] = {};
  project_tile<T>(sums, token < q_len ? vectors + token * stride : nullptr, head_dim, weights);
  uint32_t mine =
      (static_cast<uint32_t>(sums[0] > 0.0f) | static_cast<uint32_t>(sums[1] > 0.0f) << 1)
      << lane % 4 * 2;
  mine = or_of_lanes<Lanes::kQuad>(mine);
  if (lane % 4 == 0 && token < q_len) bits[token * kMaxWords * 4] = mine;
}

// How shared memory behind the plan is laid out while a block encodes: projections; where they fit,
// the queries of the group and the new keys; then the hash weights of per_pass words.
struct EncodeScratch {
  float* values;      // [q_len, num_bits]
  uint16_t* vectors;  // [q_len * group + q_len, vector_pitch]: queries, then keys; null: do not fit
  int vector_pitch;
  uint16_t* weights;  // [per_pass, head_dim, kWeightPitch]
  int per_pass;

  __device__ EncodeScratch(char* memory, int bytes, const EncodeQueryParams& p, int group) {
    // 90 vectors of 128 elements; more of them are read where they are.
    constexpr int kMostVectorBytes = 24 * 1024;
    values = reinterpret_cast<float*>(memory);
    const int value_bytes = p.q_len * p.num_words * kWordBits * 4;
    memory += value_bytes, bytes -= value_bytes;
    vector_pitch = p.head_dim + 8;  // 16 bytes more: no bank conflicts
    const int vector_bytes = p.q_len * (group + 1) * vector_pitch * 2;
    vectors = vector_bytes <= kMostVectorBytes ? reinterpret_cast<uint16_t*>(memory) : nullptr;
    weights = reinterpret_cast<uint16_t*>(memory + (vectors != nullptr ? vector_bytes : 0));
    // Where nothing is encoded, this is made but not used, and head_dim is 0.
    per_pass =
        (bytes - (vectors != nullptr ? vector_bytes : 0)) / max(word_weight_bytes(p.head_dim), 1);
  }
};

// What a block encodes: the queries of its (sequence, KV head), and its share of the new keys.
struct EncodeTask {
  const EncodeQueryParams& encode;
  const CacheAppendParams& append;
  int batch_idx, kv_head_idx;
  int group;  // query heads of the KV head
  Place place;

  // The words of weights to load are those of the queries, then this block's of the keys.
  __device__ int num_loads() const {
    return encode.num_words + num_own_words(place, encode.num_words);
  }
  __device__ bool is_query(int load) const { return load < encode.num_words; }
  __device__ int word(int load) const {
    return is_query(load) ? load : place.block + (load - encode.num_words) * place.num_blocks;
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
__device__ inline void load_vectors(const EncodeTask& task, const EncodeScratch& scratch,
                                    NewRows& new_rows, uint16_t* kept) {
  const EncodeQueryParams& p = task.encode;
  load_new_rows(task.append, task.batch_idx, task.kv_head_idx, new_rows);
  if (scratch.vectors != nullptr) {
    const int num_queries = p.q_len * task.group;
    const int num_warps = blockDim.x / kWarpSize, d = threadIdx.x % kWarpSize * 8;
#pragma unroll 1
    for (int i = threadIdx.x / kWarpSize; i < num_queries + p.q_len; i += num_warps) {
      const uint16_t* from = task.key(i - num_queries);
      if (i < num_queries) {
        const QueryGroup queries = task.queries(i / task.group);
        from = queries.heads + i % task.group * queries.head_stride;
      }
      if (d >= p.head_dim) continue;
      cp_async_16(scratch.vectors + i * scratch.vector_pitch + d, from + d, true);
      if (kept != nullptr && i < num_queries) {
        cp_async_16(kept + i * scratch.vector_pitch + d, from + d, true);
      }
    }
  }
  cp_async_commit();
}

// Encodes by a whole block: writes the planes of all query tokens to `planes` [q_len, plane_pitch]
// in shared memory, adds their ScanPlanes::base to `bases` [q_len], and writes this block's share
// of the new tokens' codes, and where they go, to `new_tokens`. largest [q_len], zero, is scratch
// in shared memory. load_pass() of the first weights and load_vectors() were called before.
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
    const bool staged = scratch.vectors != nullptr;
#pragma unroll 1
    for (int i = warp; i < count * kWordTiles * p.q_len; i += num_warps) {
      const int j = i / (count * kWordTiles), tile = i % (count * kWordTiles);
      const int load = first + tile / kWordTiles, column = tile % kWordTiles * kTileColumns;
      const uint16_t* weights = scratch.weights + tile / kWordTiles * word_stride + column;
      if (task.is_query(load)) {
        const QueryGroup queries =
            staged ? QueryGroup{scratch.vectors + j * task.group * scratch.vector_pitch, task.group,
                                scratch.vector_pitch}
                   : task.queries(j);
        project_queries<T>(queries, p.head_dim, p.query_bits, weights,
                           scratch.values + (j * p.num_words + load) * kWordBits + column,
                           largest + j);
      } else if (j == 0) {
        encode_tile<T>(
            staged ? scratch.vectors + p.q_len * task.group * scratch.vector_pitch : task.key(0),
            staged ? scratch.vector_pitch : task.append.k_token_stride, p.q_len, p.head_dim,
            weights,
            reinterpret_cast<uint8_t*>(new_tokens.codes[0] + task.word(load)) +
                column / kTileColumns);
      }
    }
  }
  find_slots(task.append, task.batch_idx, new_tokens);
  __syncthreads();
  for (int i = warp; i < p.q_len * p.num_words; i += num_warps) {
    const int j = i / p.num_words, word = i % p.num_words;
    const int base = write_planes(scratch.values + i * kWordBits, largest[j], p.query_bits,
                                  p.weight_sum, p.num_words, planes + j * plane_pitch + word);
    if (threadIdx.x % kWarpSize == 0) atomicAdd(bases + j, base);
  }
}

// Makes the TokenWeights from the planes in shared memory, by a whole block, between barriers.
template <int kNumWords>
__device__ __forceinline__ void set_token_weights(const Params& params, SharedPlan& shared) {
  const ScoreSelectParams& p = params.select;
  shared.scan.token_weights.set(shared.scan.tables.planes,
                                padded_planes(num_planes(p.weight_sum)) * kNumWords, kNumWords,
                                p.q_len, p.weight_sum);
}

// Leaves the planes of all query tokens in shared memory as the scan reads them, by a whole block.
template <int kNumWords, bool kTokens>
__device__ __forceinline__ void prepare_planes(const Params& params, SharedPlan& shared,
                                               const EncodeTask& task,
                                               const EncodeScratch& scratch) {
  const ScoreSelectParams& p = params.select;
  ScanTables& tables = shared.scan.tables;
  const int num_planes = hata::num_planes(p.weight_sum);
  const int token_words = num_planes * kNumWords;
  const int pitch = padded_planes(num_planes) * kNumWords;
  if (!params.encodes) {
    for (int i = threadIdx.x; i < p.q_len * token_words; i += blockDim.x) {
      const int j = i / token_words, word = i % token_words;
      const int64_t group =
          (int64_t{task.batch_idx} * p.q_len + j) * p.num_kv_heads + task.kv_head_idx;
      tables.planes[j * pitch + word] = p.planes[group * token_words + word];
    }
  } else if (params.encode.dtype == DType::kBFloat16) {
    encode<__nv_bfloat16>(task, scratch, tables.largest, tables.bases, tables.planes, pitch,
                          shared.new_tokens);
  } else {
    encode<__half>(task, scratch, tables.largest, tables.bases, tables.planes, pitch,
                   shared.new_tokens);
  }
  __syncthreads();
  const bool at_once = kTokens && scores_at_once<kNumWords>(p.q_len, p.weight_sum);
  if (at_once) set_token_weights<kNumWords>(params, shared);
  const int warp = threadIdx.x / kWarpSize;
  static_assert(kMaxTokens <= few_threads(KernelKind::kTokens) / kWarpSize);
  if (!params.encodes && warp < p.q_len) {
    tables.bases[warp] = plane_base<kNumWords>(tables.planes + warp * pitch, p.weight_sum);
  }
  if (at_once || !params.encodes) __syncthreads();
}

// Writes what this block appends: its words of the codes, and keys, values and norms of positions
// from `begin` to `end`, those that it also reads.
template <typename T>
__device__ __forceinline__ void write_new_tokens(const CacheAppendParams& p, int kv_head_idx,
                                                 const Place& place, int begin, int end,
                                                 const NewTokens& tokens, const NewRows& rows) {
  const int lane = threadIdx.x % kWarpSize;
  const int token = token_of_warp();
  if (token >= p.q_len || tokens.slots[token].row < 0) return;
  const Slot slot = tokens.slots[token];
  if (lane < p.code_cache.num_words && lane % place.num_blocks == place.block) {
    code_at(p.code_cache, slot, kv_head_idx)[lane] = tokens.codes[token][lane];
  }
  if (tokens.positions[token] < begin || tokens.positions[token] >= end) return;
  // Lane 4 s + c holds the elements of step s that thread c of a quad has elsewhere.
  const int d = lane * 8;
  uint4 piece = {};
  if (d < p.cache.head_dim) {
    piece = *reinterpret_cast<const uint4*>(rows.k[token] + d);
    const uint4 value_piece = *reinterpret_cast<const uint4*>(rows.v[token] + d);
    if (p.cache.dtype == DType::kFloat8E4M3) {
      *reinterpret_cast<uint2*>(key_at<uint8_t>(p.cache, slot, kv_head_idx) + d) =
          to_float8<T>(piece, k_scale_of(p.cache, kv_head_idx));
      *reinterpret_cast<uint2*>(value_at<uint8_t>(p.cache, slot, kv_head_idx) + d) =
          to_float8<T>(value_piece, v_scale_of(p.cache, kv_head_idx));
    } else {
      *reinterpret_cast<uint4*>(key_at<T>(p.cache, slot, kv_head_idx) + d) = piece;
      *reinterpret_cast<uint4*>(value_at<T>(p.cache, slot, kv_head_idx) + d) = value_piece;
    }
  }
  if (p.code_cache.norms == nullptr) return;
  const float squares = sum_of_squares<T>(piece);
  float sum = 0.0f;
  for (int step = 0; step < p.cache.head_dim / 32; ++step) {
    sum += __shfl_sync(kFullMask, squares, step * 4 + lane % 4);
  }
  const uint16_t norm = norm_of_quad(sum);
  if (lane == 0) *norm_at(p.code_cache, slot, kv_head_idx) = norm;
}

}  // namespace hata::step
