#pragma once

#include <algorithm>

#include "cuda/check.h"
#include "cuda/gather_tile.cuh"
#include "cuda/launch.cuh"

// How gather_attention is cut into blocks.
namespace hata {

constexpr int kMaxStages = 3;  // steps in flight a warp

// Warps of a block, and how many blocks share the rows of one (query token, KV head).
struct GatherShape {
  int warps;
  int splits;  // at most kMaxCluster: they are one cluster
};

constexpr int kFewWarps = 4, kManyWarps = 8;
constexpr int kMinRowsPerWarp = kTileN;

// Query heads of a block, at most.
inline int rows_of(const GatherAttentionParams& p) {
  return std::min(p.num_heads / p.cache.num_kv_heads, kTileM);
}

constexpr int stages_for(int top_k, const GatherShape& shape) {
  const int tiles = ceil_div(ceil_div(ceil_div(top_k, kTileN), shape.splits), shape.warps);
  return tiles < kMaxStages ? tiles : kMaxStages;
}

// The shape with the most warps, each with rows to attend over, for which all clusters are resident
// at once. kernel_of(warps) is the kernel of blocks of so many warps.
template <int kHeadDim, typename KernelOf>
GatherShape choose_gather_shape(const KernelOf& kernel_of, int64_t clusters, int top_k, int rows,
                                const char* op) {
  GatherShape best{kFewWarps, 1};
  for (const int warps : {kFewWarps, kManyWarps}) {
    const auto kernel = kernel_of(warps);
    for (int splits = 1; splits <= kMaxCluster; ++splits) {
      const int stages = stages_for(top_k, {warps, splits});
      const int bytes = Tile<kHeadDim>::shared_bytes(warps, stages, splits, rows);
      if (splits * warps > best.splits * best.warps &&
          (splits - 1) * warps * kMinRowsPerWarp < top_k &&
          allow_shared_memory(kernel, bytes, op) &&
          clusters <= max_active_clusters(kernel, warps * kWarpSize, bytes, splits, op)) {
        best = {warps, splits};
      }
    }
  }
  return best;
}

}  // namespace hata
