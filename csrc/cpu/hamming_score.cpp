#include "hamming_score.h"

#include <algorithm>
#include <cstring>

#include "cpu/hot_loops.h"
#include "cpu/parallel.h"
#include "selection.h"

namespace hata {
namespace {

// Positions that are scored together: their codes stay in the first-level cache while every query
// token of the sequence is scored against them, so that each code is read from memory once.
constexpr int kBlock = 1024;

struct Block {
  int64_t batch_idx, head;
  int first, count;  // positions, all in use
};

// Rows of a cache, one for each position, head and page: `width` elements that lie together, those
// of a head and page one behind the other.
template <class T>
struct Rows {
  const T* data;
  int64_t page_stride, head_stride;
  int width;
};

// The row of a block's i-th position, or null where its page does not exist.
template <class T>
const T* row_at(const PageTable& table, const Rows<T>& rows, const Block& block, int i) {
  const int t = block.first + i;
  const int page = page_of(table, static_cast<int>(block.batch_idx), t);
  if (page < 0) return nullptr;
  return rows.data + page * rows.page_stride + block.head * rows.head_stride +
         static_cast<int64_t>(row_of(table, t)) * rows.width;
}

// Into the second-level cache: this is more than the first level can wait for at once. Inlined by
// force, because GCC drops calls of functions that only prefetch.
[[gnu::always_inline]] inline void prefetch(const void* data, size_t size) {
  if (data == nullptr) return;
  constexpr size_t kLine = 64;
  for (size_t i = 0; i < size; i += kLine) {
    __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
  }
}

// The block's rows: in place where it lies in one page, else copied to buffer, with zeros for a
// page that does not exist. While it copies, it fetches the rows of the block that comes next:
// pages are too short for the processor to see where they lead.
template <class T>
const T* block_rows(const PageTable& table, const Rows<T>& rows, const Block& block,
                    const Block& next, T* buffer) {
  for (int i = 0; i < block.count;) {
    const int run =
        std::min(block.count - i - 1, table.page_mask - row_of(table, block.first + i)) + 1;
    const T* from = row_at(table, rows, block, i);
    if (from != nullptr && run == block.count) return from;
    const size_t size = static_cast<size_t>(run) * rows.width;
    if (i < next.count) prefetch(row_at(table, rows, next, i), size * sizeof(T));
    T* to = buffer + static_cast<int64_t>(i) * rows.width;
    if (from != nullptr) {
      std::memcpy(to, from, size * sizeof(T));
    } else {
      std::fill_n(to, size, T{0});
    }
    i += run;
  }
  return buffer;
}

ScanPlanes scan_planes(const HammingScoreParams& p, const uint32_t* planes) {
  ScanPlanes scan{};
  scan.num_words = p.code_cache.num_words;
  scan.num_planes = num_planes(p.weight_sum);
  scan.max_matches = p.weight_sum * scan.num_words * kWordBits;
  for (int i = 0; i < scan.num_planes; ++i) {
    scan.weights[i] = plane_weight(i, p.weight_sum);
    std::copy_n(planes + i * scan.num_words, scan.num_words, scan.planes[i]);
  }
  return scan;
}

// Scores of the first n positions of a block for one query token, at scores[0].
void score_positions(const HotLoops& loops, const ScanPlanes& planes, ScoreKind kind,
                     const uint32_t* codes, const uint16_t* norms, int n, void* scores) {
  uint16_t matches[kBlock];
  if (kind == ScoreKind::kInt32) {
    loops.count_matches(planes, codes, n, matches);
    int32_t* out = static_cast<int32_t*>(scores);
    for (int i = 0; i < n; ++i) out[i] = score_of_matches(matches[i], planes.max_matches);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(scores);
  if (norms == nullptr) return loops.count_matches(planes, codes, n, out);
  loops.count_matches(planes, codes, n, matches);
  loops.apply_norms(planes, matches, norms, n, out);
  if (kind == ScoreKind::kRank16) {
    for (int i = 0; i < n; ++i) out[i] = ordered_rank_float16(out[i]);
  }
}

// Scores block.count positions for every query token; of the `width` positions from block.first on,
// those that a token does not see get the lowest score.
void score_block(const HotLoops& loops, const HammingScoreParams& p, const Block& block,
                 const Block& next, int seq_len, int width) {
  uint32_t code_buffer[kBlock * kMaxWords];
  uint16_t norm_buffer[kBlock];
  const CodeCache& cache = p.code_cache;
  const Rows<uint32_t> code_rows{cache.codes, cache.code_page_stride, cache.code_head_stride,
                                 cache.num_words};
  const Rows<uint16_t> norm_rows{cache.norms, cache.norm_page_stride, cache.norm_head_stride, 1};
  const uint32_t* codes = block_rows(p.table, code_rows, block, next, code_buffer);
  const uint16_t* norms =
      cache.norms == nullptr ? nullptr : block_rows(p.table, norm_rows, block, next, norm_buffer);
  const int planes_size = num_planes(p.weight_sum) * cache.num_words;

  for (int j = 0; j < p.q_len; ++j) {
    const int64_t row = (block.batch_idx * p.q_len + j) * p.num_kv_heads + block.head;
    const int64_t first = row * p.max_seq_len + block.first;
    const int visible = visible_len(seq_len, p.q_len, j);
    const int n = std::clamp(visible - block.first, 0, block.count);
    if (p.kind == ScoreKind::kInt32) {
      int32_t* scores = static_cast<int32_t*>(p.scores) + first;
      if (n > 0) {
        score_positions(loops, scan_planes(p, p.planes + row * planes_size), p.kind, codes, norms,
                        n, scores);
      }
      std::fill(scores + n, scores + width, kLowestScore<int32_t>);
    } else {
      uint16_t* scores = static_cast<uint16_t*>(p.scores) + first;
      if (n > 0) {
        score_positions(loops, scan_planes(p, p.planes + row * planes_size), p.kind, codes, norms,
                        n, scores);
      }
      if (p.kind == ScoreKind::kFloat16) {
        std::fill(scores + n, scores + width, kLowestScore<uint16_t>);
      }
    }
  }
}

// Block `item` of the num_blocks of each head of sequence b, whose first `used` positions are in
// use. They come as their codes lie in memory, page by page and there head by head; where a page is
// shorter than a block, the heads of a block follow each other.
Block block_at(const HammingScoreParams& p, int64_t b, int64_t num_blocks, int used, int64_t item) {
  const int64_t page_blocks = std::max<int64_t>(1, (int64_t{p.table.page_mask} + 1) / kBlock);
  const int64_t page_first = item / (page_blocks * p.num_kv_heads) * page_blocks;
  const int64_t in_page = item - page_first * p.num_kv_heads;
  const int64_t width = std::min(page_blocks, num_blocks - page_first);
  const int first = static_cast<int>(page_first + in_page % width) * kBlock;
  return Block{b, in_page / width, first, std::clamp(used - first, 0, kBlock)};
}

}  // namespace

void hamming_score_cpu(const HammingScoreParams& p) {
  const HotLoops& loops = hot_loops();
  const auto used = [&](int64_t b) {
    return std::min(seq_len_of(p.table, static_cast<int>(b)), p.max_seq_len);
  };
  // The internal ranks of positions that are not in use are not written, the public scores are.
  const auto blocks_of = [&](int64_t b) -> int64_t {
    const int width = p.kind == ScoreKind::kRank16 ? used(b) : p.max_seq_len;
    return (width + kBlock - 1) / kBlock;
  };
  int64_t total = 0;
  for (int64_t b = 0; b < p.table.batch; ++b) total += blocks_of(b) * p.num_kv_heads;

  parallel_for(total, 4, [&](int64_t begin, int64_t end) {
    int64_t b = 0, first_item = 0;  // of sequence b
    const auto block_of = [&](int64_t item) {
      while (item >= first_item + blocks_of(b) * p.num_kv_heads) {
        first_item += blocks_of(b++) * p.num_kv_heads;
      }
      return block_at(p, b, blocks_of(b), used(b), item - first_item);
    };
    Block next = block_of(begin);
    for (int64_t item = begin; item < end; ++item) {
      const Block block = next;
      next = item + 1 < end ? block_of(item + 1) : Block{};
      score_block(loops, p, block, next, seq_len_of(p.table, static_cast<int>(block.batch_idx)),
                  std::min(kBlock, p.max_seq_len - block.first));
    }
  });
}

}  // namespace hata
