#pragma once

#include "cuda/primitives/warp.cuh"
#include "paged_cache.h"

// Loading codes and norms from a paged cache, shared by every kernel that scans.
namespace hata {

// The codes of consecutive positions that one thread loads and scores: 8 words or less, and two
// positions or more, because a thread of a binary product owns two rows. Words are in the order of
// the products' operands: of each pair of positions the first words, the second words, and so on.
template <int kNumWords>
struct CodeUnit {
  static constexpr int kTokens = kNumWords == 1 ? 4 : 2;
  static constexpr int kWords = kTokens * kNumWords;
  uint32_t words[kWords];  // 0 where there is no code

  // The place of word w of position t.
  static constexpr int place(int t, int w) { return t / 2 * 2 * kNumWords + 2 * w + t % 2; }

  __device__ __forceinline__ void load(const uint32_t* from) {
    constexpr int kPiece = kWords % 4 == 0 ? 4 : 2;  // words of one load
#pragma unroll
    for (int i = 0; i < kWords; i += kPiece) {
      uint32_t piece[kPiece];
      if constexpr (kPiece == 4) {
        const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(from + i));
        piece[0] = loaded.x, piece[1] = loaded.y, piece[2] = loaded.z, piece[3] = loaded.w;
      } else {
        const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(from + i));
        piece[0] = loaded.x, piece[1] = loaded.y;
      }
#pragma unroll
      for (int w = 0; w < kPiece; ++w) {
        words[place((i + w) / kNumWords, (i + w) % kNumWords)] = piece[w];
      }
    }
  }
};

// A warp's worth of units, contiguous in the sequence: unit i of a lane begins at position
// first + (32 i + lane) kTokens.
template <int kNumWords, bool kNorms, int kUnits>
struct CodeChunk {
  using Unit = CodeUnit<kNumWords>;
  static constexpr int kPositions = kUnits * Unit::kTokens * kWarpSize;
  Unit units[kUnits];
  uint32_t norms[kNorms ? kUnits * Unit::kTokens / 2 : 1];  // pairs of float16

  __device__ static int position_of(int first, int i) {
    return first + (i * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize) * Unit::kTokens;
  }
};

// Reads the codes and norms of one sequence and KV head.
template <int kNumWords>
class CodeReader {
 public:
  using Unit = CodeUnit<kNumWords>;

  // `page` is only_page().
  __device__ CodeReader(const PageTable& table, const CodeCache& cache, int batch_idx,
                        int kv_head_idx, int page)
      : table_(table),
        cache_(cache),
        codes_(cache.codes + kv_head_idx * cache.code_head_stride),
        norms_(cache.norms + kv_head_idx * cache.norm_head_stride),
        batch_idx_(batch_idx),
        one_page_(table.max_pages == 1) {
    const bool codes_aligned = reinterpret_cast<uintptr_t>(cache.codes) % 16 == 0 &&
                               cache.code_page_stride % 4 == 0 && cache.code_head_stride % 4 == 0;
    const bool norms_aligned = reinterpret_cast<uintptr_t>(cache.norms) % 4 == 0 &&
                               cache.norm_page_stride % 2 == 0 && cache.norm_head_stride % 2 == 0;
    whole_ = (table.page_mask + 1u) % Unit::kTokens == 0 && codes_aligned && norms_aligned;
    if (one_page_) {
      whole_ = whole_ && page >= 0;
      codes_ = page < 0 ? nullptr : codes_ + page * cache.code_page_stride;
      norms_ += page * cache.norm_page_stride;
    }
  }

  // Whether load_whole may be used: every unit of the sequence lies in one page and is aligned.
  __device__ bool has_whole_units() const { return whole_; }

  // Loads a chunk that lies within the sequence.
  template <bool kNorms, int kUnits>
  __device__ __forceinline__ void load_whole(CodeChunk<kNumWords, kNorms, kUnits>& chunk,
                                             int first) const {
    using Chunk = CodeChunk<kNumWords, kNorms, kUnits>;
    if (one_page_) {
      const int position = Chunk::position_of(first, 0);
      const uint32_t* code = codes_ + int64_t{position} * kNumWords;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        chunk.units[i].load(code + i * kWarpSize * Unit::kWords);
      }
      if constexpr (kNorms) {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          load_norms<kUnits>(chunk, i, norms_ + position + i * kWarpSize * Unit::kTokens);
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int position = Chunk::position_of(first, i);
      const int page = page_of(table_, batch_idx_, position);
      chunk.units[i] = {};
      if constexpr (kNorms) {
        for (int t = 0; t < Unit::kTokens / 2; ++t) chunk.norms[i * Unit::kTokens / 2 + t] = 0;
      }
      if (page < 0) continue;
      const int row = row_of(table_, position);
      chunk.units[i].load(codes_ + page * cache_.code_page_stride + int64_t{row} * kNumWords);
      if constexpr (kNorms) {
        load_norms<kUnits>(chunk, i, norms_ + page * cache_.norm_page_stride + row);
      }
    }
  }

  // Loads one unit of any sequence; codes and norms of positions from `end` on are 0.
  template <bool kNorms>
  __device__ __forceinline__ void load_part(CodeChunk<kNumWords, kNorms, 1>& chunk, int first,
                                            int end) const {
    chunk = {};
    const int position = chunk.position_of(first, 0);
#pragma unroll
    for (int t = 0; t < Unit::kTokens; ++t) {
      const uint32_t* code = position + t < end ? code_address(position + t) : nullptr;
      if (code == nullptr) continue;
#pragma unroll
      for (int w = 0; w < kNumWords; ++w) {
        chunk.units[0].words[Unit::place(t, w)] = __ldg(code + w);
      }
      if constexpr (kNorms) {
        chunk.norms[t / 2] |= uint32_t{__ldg(norm_address(position + t))} << t % 2 * 16;
      }
    }
  }

  // Brings the codes and norms of kPositions positions from `first` on, those before `end`, into
  // L2, by a warp.
  template <bool kNorms, int kPositions>
  __device__ __forceinline__ void prefetch(int first, int end) const {
    constexpr int kLine = 128;  // bytes
    prefetch_lines<kPositions, kLine / (4 * kNumWords)>(
        first, end, [&](int position) -> const void* { return code_address(position); });
    if constexpr (kNorms) {
      prefetch_lines<kPositions, kLine / 2>(
          first, end, [&](int position) -> const void* { return norm_address(position); });
    }
  }

  // Return where a position's code and norm are; null where its page does not exist.
  __device__ __forceinline__ const uint32_t* code_address(int position) const {
    if (one_page_) return codes_ == nullptr ? nullptr : codes_ + int64_t{position} * kNumWords;
    const int page = page_of(table_, batch_idx_, position);
    return page < 0 ? nullptr
                    : codes_ + page * cache_.code_page_stride +
                          int64_t{row_of(table_, position)} * kNumWords;
  }
  __device__ __forceinline__ const uint16_t* norm_address(int position) const {
    if (one_page_) return codes_ == nullptr ? nullptr : norms_ + position;
    const int page = page_of(table_, batch_idx_, position);
    return page < 0 ? nullptr : norms_ + page * cache_.norm_page_stride + row_of(table_, position);
  }

 private:
  template <int kPositions, int kPerLine, typename Address>
  __device__ __forceinline__ static void prefetch_lines(int first, int end,
                                                        const Address& address) {
    constexpr int kLines = (kPositions + kPerLine - 1) / kPerLine;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int line = 0; line < kLines; line += kWarpSize) {
      const int position = first + (line + lane) * kPerLine;
      if (line + lane >= kLines || position >= end) continue;
      const void* from = address(position);
      if (from != nullptr) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
    }
  }

  template <int kUnits>
  __device__ __forceinline__ static void load_norms(CodeChunk<kNumWords, true, kUnits>& chunk,
                                                    int i, const uint16_t* from) {
#pragma unroll
    for (int t = 0; t < Unit::kTokens / 2; ++t) {
      chunk.norms[i * Unit::kTokens / 2 + t] = __ldg(reinterpret_cast<const uint32_t*>(from) + t);
    }
  }

  const PageTable& table_;
  const CodeCache& cache_;
  const uint32_t* codes_;  // of the KV head; of a contiguous cache, of the sequence
  const uint16_t* norms_;
  int batch_idx_;
  bool one_page_;
  bool whole_;
};

}  // namespace hata
