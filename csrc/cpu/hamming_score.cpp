#include "hamming_score.h"

#include <algorithm>
#include <cstring>
#include <limits>

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

// `width` elements per position, of the head and block: in place where the block lies in one page,
// else copied to buffer, with zeros for a page that does not exist.
template <class T>
const T* block_rows(const PageTable& table, const Block& block, const T* data, int64_t page_stride,
                    int64_t head_stride, int width, T* buffer) {
  const int b = static_cast<int>(block.batch_idx);
  const int end = block.first + block.count;
  for (int t = block.first; t < end;) {
    const int row = row_of(table, t);
    const int run = std::min(end - 1 - t, table.page_mask - row) + 1;
    const int page = page_of(table, b, t);
    const T* rows =
        data + page * page_stride + block.head * head_stride + static_cast<int64_t>(row) * width;
    if (page >= 0 && run == block.count) return rows;
    T* to = buffer + static_cast<int64_t>(t - block.first) * width;
    const size_t size = static_cast<size_t>(run) * width;
    if (page >= 0) {
      std::memcpy(to, rows, size * sizeof(T));
    } else {
      std::fill_n(to, size, T{0});
    }
    t += run;
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
    for (int i = 0; i < n; ++i) out[i] = 2 * matches[i] - planes.max_matches;
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(scores);
  if (norms == nullptr) return loops.count_matches(planes, codes, n, out);
  loops.count_matches(planes, codes, n, matches);
  loops.apply_norms(planes, matches, norms, n, out);
  if (kind == ScoreKind::kKey16) {
    for (int i = 0; i < n; ++i) out[i] = ordered_key_float16(out[i]);
  }
}

// Scores block.count positions for every query token; of the `width` positions from block.first on,
// those that a token does not see get the lowest score.
void score_block(const HotLoops& loops, const HammingScoreParams& p, const Block& block,
                 int seq_len, int width) {
  uint32_t code_buffer[kBlock * kMaxWords];
  uint16_t norm_buffer[kBlock];
  const CodeCache& cache = p.code_cache;
  const uint32_t* codes = block_rows(p.table, block, cache.codes, cache.code_page_stride,
                                     cache.code_head_stride, cache.num_words, code_buffer);
  const uint16_t* norms = cache.norms == nullptr
                              ? nullptr
                              : block_rows(p.table, block, cache.norms, cache.norm_page_stride,
                                           cache.norm_head_stride, 1, norm_buffer);
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
      std::fill(scores + n, scores + width, std::numeric_limits<int32_t>::min());
    } else {
      constexpr uint16_t kMinusInfinity = 0xfc00;
      uint16_t* scores = static_cast<uint16_t*>(p.scores) + first;
      if (n > 0) {
        score_positions(loops, scan_planes(p, p.planes + row * planes_size), p.kind, codes, norms,
                        n, scores);
      }
      if (p.kind == ScoreKind::kFloat16) std::fill(scores + n, scores + width, kMinusInfinity);
    }
  }
}

}  // namespace

void hamming_score_cpu(const HammingScoreParams& p) {
  const HotLoops& loops = hot_loops();
  const auto used = [&](int64_t b) {
    return std::min(seq_len_of(p.table, static_cast<int>(b)), p.max_seq_len);
  };
  // The internal keys of positions that are not in use are not written, the public scores are.
  const auto blocks_of = [&](int64_t b) -> int64_t {
    const int width = p.kind == ScoreKind::kKey16 ? used(b) : p.max_seq_len;
    return (width + kBlock - 1) / kBlock;
  };
  int64_t total = 0;
  for (int64_t b = 0; b < p.table.batch; ++b) total += blocks_of(b) * p.num_kv_heads;

  parallel_for(total, 4, [&](int64_t begin, int64_t end) {
    int64_t b = 0, first_item = 0;  // of sequence b
    for (int64_t item = begin; item < end; ++item) {
      while (item >= first_item + blocks_of(b) * p.num_kv_heads) {
        first_item += blocks_of(b++) * p.num_kv_heads;
      }
      const int64_t blocks = blocks_of(b);
      const int first = static_cast<int>((item - first_item) % blocks) * kBlock;
      const Block block{b, (item - first_item) / blocks, first,
                        std::clamp(used(b) - first, 0, kBlock)};
      score_block(loops, p, block, seq_len_of(p.table, static_cast<int>(b)),
                  std::min(kBlock, p.max_seq_len - first));
    }
  });
}

}  // namespace hata
