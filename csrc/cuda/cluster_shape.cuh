#pragma once

#include <algorithm>
#include <cstddef>

#include "cuda/cluster_scan.cuh"
#include "cuda/launch.cuh"

// How score_select by clusters is cut into blocks.
namespace hata {

// Threads of a block: two blocks share a multiprocessor, or one has it to itself.
constexpr int kFewThreads = 320, kManyThreads = 640;
constexpr int kSliceAlignment = 32;  // positions: a word of the candidates' bits
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
static_assert(kRowOffset + attend_row_bytes(kFewThreads, kMaxAttendHeadDim) <=
              kKeyOffset + kSharedKeyBytes);
static_assert(kRowOffset + attend_row_bytes(kManyThreads, kMaxAttendHeadDim) <=
              kKeyOffset + kMostKeyBytes);

// How the work is cut: threads of a block, their shared memory for keys, blocks of a cluster.
struct ClusterShape {
  int threads;
  int key_bytes;
  int cluster_size;
};

// Shared memory for the keys of one block's slice of a full cache, within what there is; in all
// enough for rows, which take the place of everything from the histogram on.
inline int key_bytes_for(const ClusterParams& params, int threads, int cluster_size) {
  if (threads == kFewThreads) return kSharedKeyBytes;
  const ScoreSelectParams& p = params.select;
  const int64_t slice =
      ceil_div(p.table.capacity, cluster_size * kSliceAlignment) * kSliceAlignment;
  int64_t bytes = slice * p.q_len * 2;
  if (params.attends) {
    const int row_bytes = attend_row_bytes(threads, params.attend.cache.head_dim);
    bytes = std::max<int64_t>(bytes, kRowOffset + row_bytes - kKeyOffset) + kKeptBytes;
  }
  return static_cast<int>(std::clamp<int64_t>(bytes, kSharedKeyBytes, kMostKeyBytes));
}

// The shape with the most threads for which all clusters are resident at once: a second wave would
// wait for the slowest of the first.
template <typename Kernel>
ClusterShape choose_shape(Kernel kernel, const ClusterParams& params, const char* op) {
  const int num_clusters = params.select.table.batch * params.select.num_kv_heads;
  ClusterShape best{kFewThreads, kSharedKeyBytes, 1};
  int most = 0;
  for (const int threads : {kManyThreads, kFewThreads}) {
    for (int size = 1; size <= kMaxCluster; ++size) {
      const int key_bytes = key_bytes_for(params, threads, size);
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
