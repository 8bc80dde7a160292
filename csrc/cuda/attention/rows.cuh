#pragma once

#include <type_traits>

#include "cuda/attention/operands.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/primitives/cp_async.cuh"

// How a warp of gather_attention or dense_attention reads rows and attends over them.
namespace hata {

constexpr int kMaxStages = 3;  // tiles in flight a warp

// Starts the copies of `heads` queries, of which `q(i)` is the address, as rows of Tile's pitch, by
// a whole block; the rows up to padded_heads become zero.
template <typename T, int kHeadDim, typename Query>
__device__ __forceinline__ void load_queries(T* to, const Query& q, int heads, int padded_heads) {
  constexpr int kPieces = kHeadDim / 8;  // 16-byte pieces of a row
  for (int i = threadIdx.x; i < padded_heads * kPieces; i += blockDim.x) {
    const int head = i / kPieces, piece = i % kPieces;
    const T* from = q(head < heads ? head : 0);
    cp_async_16(to + head * Tile<T, kHeadDim>::kPitch + piece * 8, from + piece * 8, head < heads);
  }
}

// What the products of T rows, and the sums of their values, are multiplied with.
template <typename T>
__device__ __forceinline__ float k_scale_of_rows(const KvCache& cache, int kv_head_idx) {
  return kIsFloat8<T> ? k_scale_of(cache, kv_head_idx) : 1.0f;
}
template <typename T>
__device__ __forceinline__ float v_scale_of_rows(const KvCache& cache, int kv_head_idx) {
  return kIsFloat8<T> ? v_scale_of(cache, kv_head_idx) : 1.0f;
}

// The rows of one KV head that some queries attend to. They see positions below `visible`; the page
// is only_page().
struct RowList {
  int batch_idx, kv_head_idx;
  int visible;
  int only_page;
  int num_positions;
  const int32_t* positions;  // in any memory; unused where the list is all positions in order
};

// Finds the rows of a list in the cache. With kDense the list is all positions in order.
template <typename T, bool kDense>
class RowLocator {
 public:
  __device__ RowLocator(const AttentionParams& p, const RowList& list)
      : table_(p.table), cache_(p.cache), list_(list) {}

  // Returns the position that a lane looks at of a tile of 16: -1 past the end of the list.
  __device__ int position(int tile) const {
    const int i = tile * kTileRows + static_cast<int>(threadIdx.x) % kTileRows;
    if (i >= list_.num_positions) return -1;
    return kDense ? i : list_.positions[i];
  }

  // Says where a position's key and value are, and returns false where the token does not see it or
  // its page does not exist.
  __device__ bool find(int position, int& page, int& row) const {
    page = row = 0;
    if (position < 0 || position >= list_.visible) return false;
    const int found =
        table_.max_pages == 1 ? list_.only_page : page_of(table_, list_.batch_idx, position);
    if (found < 0) return false;
    page = found;
    row = row_of(table_, position);
    return true;
  }

  __device__ const T* key(int page, int row) const {
    return static_cast<const T*>(cache_.k) + page * cache_.k_page_stride +
           row * cache_.k_token_stride + list_.kv_head_idx * cache_.k_head_stride;
  }
  __device__ const T* value(int page, int row) const {
    return static_cast<const T*>(cache_.v) + page * cache_.v_page_stride +
           row * cache_.v_token_stride + list_.kv_head_idx * cache_.v_head_stride;
  }

 private:
  const PageTable& table_;
  const KvCache& cache_;
  const RowList& list_;
};

// A warp's tiles first, first + step, ... below end of a list of rows, and its shared memory:
// num_stages tiles of keys and values.
template <typename T>
struct WarpTiles {
  int first, step, end;
  T* stages;
  int num_stages;
};

// Attends over a warp's tiles, with up to kStages of them in flight: construct, which starts the
// first copies; wait for the queries; run. The keys of one tile and its values are a group of
// copies each, and the next tile's keys are fetched as soon as this one's have been used.
template <typename T, int kHeadDim, int kHeadTiles, int kStages,
          typename Locator = RowLocator<T, false>>
class RowStream {
 public:
  __device__ RowStream(const Locator& locator, const WarpTiles<T>& tiles)
      : locator_(locator), tiles_(tiles) {
    int positions[kStages];
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      positions[s] = s < tiles.num_stages ? position_of(tiles.first + s * tiles.step) : -1;
    }
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (s >= tiles.num_stages) break;
      const Rows rows = locate(positions[s]);
      T* keys = tiles.stages + 2 * s * Tile::kElements;
      fetch(keys, locator.key(rows.page, rows.row), rows.valid);
      fetch(keys + Tile::kElements, locator.value(rows.page, rows.row), rows.valid);
      valid_rows_ |= ValidRows{rows.valid} << s * kTileRows;
    }
    next_position_ = position_of(tiles.first + tiles.num_stages * tiles.step);
  }

  // Waits for the copies that this thread started before the first tile's.
  __device__ void wait_for_earlier_copies() const { wait_for_all_but(2 * tiles_.num_stages); }

  // Queries are prepare_queries()'s. In each tile, query heads 2 (lane % 4) + i of tile of heads m
  // attend to the rows that exist and of which sees(row of the list, m, i) is true. Where warps
  // share their rows, complete(products, keys) adds up the products of each one's channels, and may
  // use the place of the tile's keys for that.
  template <typename Scale, typename Sees, typename Complete>
  __device__ void run(Accumulator<kHeadDim, kHeadTiles>& acc, const Operand<T>* queries,
                      const Scale& scale, const Sees& sees, const Complete& complete) {
    const int pending = 2 * tiles_.num_stages - 1;
    for (int tile = tiles_.first, stage = 0; tile < tiles_.end; tile += tiles_.step) {
      T* keys = tiles_.stages + 2 * stage * Tile::kElements;
      T* values = keys + Tile::kElements;
      const unsigned valid = valid_rows_ >> stage * kTileRows & 0xffffu;
      const Rows next = locate(next_position_);
      next_position_ = position_of(tile + (tiles_.num_stages + 1) * tiles_.step);
      wait_for_all_but(pending);
      __syncwarp();
      TileWeights<kHeadTiles> weights;
      if (valid != 0) {
        weights = score_tile<T>(
            acc, queries, keys, valid, scale,
            [&](int row, int m, int i) { return sees(tile * kTileRows + row, m, i); },
            [&](float (&products)[kHeadTiles][4]) { complete(products, keys); });
      }
      __syncwarp();  // every lane has read its part of the keys
      fetch(keys, locator_.key(next.page, next.row), next.valid);
      wait_for_all_but(pending);
      __syncwarp();
      if (valid != 0) add_values<T>(acc, values, weights);
      __syncwarp();
      fetch(values, locator_.value(next.page, next.row), next.valid);
      valid_rows_ &= ~(ValidRows{0xffff} << stage * kTileRows);
      valid_rows_ |= ValidRows{next.valid} << stage * kTileRows;
      stage = stage + 1 == tiles_.num_stages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
  }
  template <typename Scale, typename Sees>
  __device__ void run(Accumulator<kHeadDim, kHeadTiles>& acc, const Operand<T>* queries,
                      const Scale& scale, const Sees& sees) {
    run(acc, queries, scale, sees, [](float (&)[kHeadTiles][4], T*) {});
  }
  template <typename Scale>
  __device__ void run(Accumulator<kHeadDim, kHeadTiles>& acc, const Operand<T>* queries,
                      const Scale& scale) {
    run(acc, queries, scale, [](int, int, int) { return true; });
  }

 private:
  using Tile = Tile<T, kHeadDim>;
  using ValidRows = std::conditional_t<kStages <= 2, uint32_t, uint64_t>;  // 16 bits a stage

  // Which of a tile's 16 rows exist, and in lane r and r + 16 where row r is.
  struct Rows {
    unsigned valid;
    int page, row;
  };

  // Returns the position that this lane looks at of a tile.
  __device__ int position_of(int tile) const {
    return tile < tiles_.end ? locator_.position(tile) : -1;
  }

  __device__ Rows locate(int position) const {
    Rows rows;
    const bool found = locator_.find(position, rows.page, rows.row);
    rows.valid = __ballot_sync(kFullMask, found) & 0xffffu;
    return rows;
  }

  // Starts the copies of the valid rows of a tile, one group; the others become zero. `from` is
  // lane r's row r.
  __device__ static void fetch(T* to, const T* from, unsigned valid) {
    constexpr int kPiece = 16 / sizeof(T);  // elements of 16 bytes
    constexpr int kPieces = kHeadDim / kPiece;
    // Registers are scarcer beside float8: fewer addresses at once, and no lane kept for them.
    constexpr int kUnrolled = kIsFloat8<T> ? 2 : 4;
    const int lane = kIsFloat8<T> ? lane_here() : threadIdx.x % kWarpSize;
    if (valid != 0) {
#pragma unroll kUnrolled
      for (int i = lane; i < kTileRows * kPieces; i += kWarpSize) {
        const int row = i / kPieces, piece = i % kPieces;
        const auto row_from = reinterpret_cast<const T*>(
            __shfl_sync(kFullMask, reinterpret_cast<uint64_t>(from), row));
        cp_async_16(to + row * Tile::kPitch + piece * kPiece, row_from + piece * kPiece,
                    valid >> row & 1u);
      }
    }
    cp_async_commit();
  }

  __device__ static void wait_for_all_but(int groups) {
    static_assert(kMaxStages == 3);
    switch (groups) {
      case 1:
        return cp_async_wait<1>();
      case 2:
        return cp_async_wait<2>();
      case 3:
        return cp_async_wait<3>();
      case 4:
        return cp_async_wait<4>();
      case 5:
        return cp_async_wait<5>();
      default:
        return cp_async_wait<6>();
    }
  }

  const Locator locator_;
  const WarpTiles<T> tiles_;
  ValidRows valid_rows_ = 0;
  int next_position_;
};

}  // namespace hata
