#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>

#include "cuda/cluster_scan.cuh"
#include "cuda/launch.cuh"

// How score_select by clusters is cut into blocks.
namespace hata {

// Threads of a block, where two blocks share a multiprocessor; one that has it to itself has twice
// as many. With several query tokens a thread has more sums to keep, and 128 registers for them
// instead of 96.
constexpr int few_threads(ClusterUse use) {
  return use == ClusterUse::kTokens ? 256 : 320;
}
constexpr int many_threads(ClusterUse use) {
  return 2 * few_threads(use);
}
constexpr int kSliceAlignment = 32;  // positions: a word of ComparedKeys
constexpr int kKeyOffset = (sizeof(ClusterShared) + 15) / 16 * 16;
// Shared memory of a block for keys, and before that for hash weights: the most of which two
// blocks fit, and the most there is. A block may have 227 KB, a multiprocessor has 228 KB and takes
// 1 KB a block for itself; the kernel also has a little static shared memory.
constexpr int kStaticBytes = 256;
constexpr int kSharedKeyBytes = 113 * 1024 - kStaticBytes - kKeyOffset;
constexpr int kMostKeyBytes = 227 * 1024 - kStaticBytes - kKeyOffset;

// Where the rows that a block attends over begin. Those of all its warps fit.
constexpr int kKeptBytes = 4 * 1024;  // for the positions that a block selects
constexpr int kRowOffset = offsetof(ClusterShared, histogram);
static_assert(kRowOffset % 16 == 0);
static_assert(kRowOffset + attend_row_bytes(few_threads(ClusterUse::kAllFit), kMaxAttendHeadDim) <=
              kKeyOffset + kSharedKeyBytes);
static_assert(kRowOffset + attend_row_bytes(many_threads(ClusterUse::kAllFit), kMaxAttendHeadDim) <=
              kKeyOffset + kMostKeyBytes);

// How the work is cut: threads of a block, their shared memory for keys, blocks of a cluster.
struct ClusterShape {
  int threads;
  int key_bytes;
  int cluster_size;
};

// Positions of a block's slice of a full cache.
inline int slice_of(const ScoreSelectParams& p, int cluster_size) {
  return ceil_div(p.table.capacity, cluster_size * kSliceAlignment) * kSliceAlignment;
}

// Shared memory for the keys of one block's slice of a full cache, within what there is; in all
// enough for rows, which take the place of everything from the histogram on.
inline int key_bytes_for(const ClusterParams& params, int threads, bool shares, int cluster_size) {
  const ScoreSelectParams& p = params.select;
  if (shares) return kSharedKeyBytes;
  if (p.algorithm == ScoreSelectAlgorithm::kCandidates) return kMostKeyBytes;
  int64_t bytes = int64_t{slice_of(p, cluster_size)} * p.q_len * 2;
  if (params.attends) {
    const int row_bytes = attend_row_bytes(threads, params.attend.cache.head_dim);
    bytes = std::max<int64_t>(bytes, kRowOffset + row_bytes - kKeyOffset) + kKeptBytes;
  }
  return static_cast<int>(std::clamp<int64_t>(bytes, kSharedKeyBytes, kMostKeyBytes));
}

// Whether the keys of a full cache fit into shared memory. Otherwise, lists of candidates do.
inline bool all_keys_fit(const ScoreSelectParams& p, const ClusterShape& shape) {
  return p.algorithm != ScoreSelectAlgorithm::kCandidates &&
         int64_t{slice_of(p, shape.cluster_size)} * p.q_len * 2 <= shape.key_bytes;
}

constexpr int list_entries(int bytes, int bit_words, int threads, int q_len) {
  return (bytes - (kTableWords + 2 * bit_words) * 4) / (threads * q_len * 4);
}
constexpr bool lists_fit(int bytes, int threads, int q_len) {
  return list_entries(bytes, threads * ComparedKeys::kWords, threads, q_len) >=
         kListHeader + kListGroup;
}
constexpr bool lists_fit(ClusterUse use, int q_len) {
  return lists_fit(kSharedKeyBytes, few_threads(use), q_len) &&
         lists_fit(kMostKeyBytes, many_threads(use), q_len);
}
static_assert(lists_fit(ClusterUse::kOneToken, 1));
static_assert(lists_fit(ClusterUse::kTokens, kMaxClusterTokens));

// Says how long they are, and how many words each half of TileBits has.
inline void share_out_candidates(ClusterParams& params, const ClusterShape& shape) {
  const ScoreSelectParams& p = params.select;
  params.num_bit_words =
      shape.threads * TileBits::words_for(slice_of(p, shape.cluster_size), shape.threads);
  const int entries = list_entries(shape.key_bytes, params.num_bit_words, shape.threads, p.q_len);
  const bool few = p.algorithm == ScoreSelectAlgorithm::kCandidates;
  const int used = few ? kListHeader + kListGroup : entries;
  params.list_bytes = used * shape.threads * 4;
  params.list_full = (used - kListGroup) * shape.threads * 4;
}

// Keys are below this.
inline int num_keys(const ScoreSelectParams& p) {
  if (p.code_cache.norms != nullptr) return 1 << 16;
  return p.weight_sum * p.code_cache.num_words * kWordBits + 1;
}

inline Bins bins_for(const ScoreSelectParams& p, int keys) {
  const auto padded = [](int bins) { return ceil_div(bins, kGroupBins) * kGroupBins; };
  // If there must be a second histogram, one of a single group is found fastest.
  int shift = padded(keys) * p.q_len <= kHistogramBins ? 0 : std::bit_width(kGroupBins - 1u);
  while (padded(ceil_div(keys, 1 << shift)) * p.q_len > kHistogramBins) ++shift;
  return {{padded(ceil_div(keys, 1 << shift)), padded(1 << shift)}, shift};
}

// The shape with the most threads for which all clusters are resident at once: a second wave would
// wait for the slowest of the first.
template <typename Kernel>
ClusterShape choose_shape(Kernel kernel, ClusterUse use, const ClusterParams& params,
                          const char* op) {
  const int num_clusters = params.select.table.batch * params.select.num_kv_heads;
  ClusterShape best{few_threads(use), kSharedKeyBytes, 1};
  int most = 0;
  for (const int threads : {many_threads(use), few_threads(use)}) {
    for (int size = 1; size <= kMaxCluster; ++size) {
      const int key_bytes = key_bytes_for(params, threads, threads == few_threads(use), size);
      if (num_clusters <= max_active_clusters(kernel, threads, kKeyOffset + key_bytes, size, op) &&
          threads * size > most) {
        most = threads * size;
        best = {threads, key_bytes, size};
      }
    }
  }
  return best;
}

}  // namespace hata
