#pragma once

#include <algorithm>
#include <optional>

#include "cuda/attention/merge.cuh"
#include "cuda/primitives/check.h"
#include "cuda/primitives/launch.cuh"

// How gather_attention is cut into blocks.
namespace hata {

// Warps of a block, and how many blocks share the rows of one (query token, KV head).
struct GatherShape {
  int warps;
  int splits;  // at most kMaxCluster: they are one cluster
};

// Blocks of a multiprocessor that a kernel's registers are cut for, 0 where the compiler chooses.
// For older devices it would choose a few registers less than some kernels have values.
constexpr int kMinBlocks = kIsSm90 ? 0 : 1;

// Warps of a block, or twice as many: the rows of two that have 512 channels take 65 KB.
constexpr int few_warps(int head_dim) {
  return head_dim > 256 ? 2 : 4;
}
constexpr int kMinRowsPerWarp = kTileRows;

// Shared memory of a block: the queries, then for each warp its stages, whose place the partial
// results take at the end; behind them what the blocks of a cluster send each other.
template <typename T, int kHeadDim, int kHeadTiles>
struct GatherLayout {
  static constexpr int kHeads = kHeadTiles * kTileHeads;
  static constexpr int kQueryBytes = kHeads * Tile<Operand<T>, kHeadDim>::kPitch * 2;
  // Tiles in flight a warp: not so many that a block of few warps fills a multiprocessor.
  static constexpr int kMostStages = Tile<T, kHeadDim>::kStageBytes > 32 * 1024 ? 1 : kMaxStages;

  static constexpr int stages_for(int top_k, const GatherShape& shape) {
    const int tiles = ceil_div(ceil_div(ceil_div(top_k, kTileRows), shape.splits), shape.warps);
    return std::min(tiles, kMostStages);
  }

  static constexpr int received_offset(int warps, int stages) {
    return kQueryBytes + std::max(warps * stages * Tile<T, kHeadDim>::kStageBytes,
                                  Partials::bytes(warps, kHeads, kHeadDim));
  }
  static constexpr int bytes(int warps, int stages, int splits, int heads) {
    return received_offset(warps, stages) + Received::bytes(splits, heads, kHeadDim);
  }
};

// Chooses the shape with the most warps, each with rows to attend over, for which all clusters are
// resident at once; nothing where the device has no clusters. kernel_of(warps) is the kernel of
// blocks of so many warps, of which there are two.
template <typename Layout, typename KernelOf>
std::optional<GatherShape> choose_gather_shape(const KernelOf& kernel_of, int few_warps,
                                               int64_t clusters, int top_k, int heads,
                                               const char* op) {
  if (!compiled_for_clusters(kernel_of(few_warps), op)) return std::nullopt;
  GatherShape best{few_warps, 1};
  for (const int warps : {few_warps, 2 * few_warps}) {
    const auto kernel = kernel_of(warps);
    for (int splits = 1; splits <= kMaxCluster; ++splits) {
      const int stages = Layout::stages_for(top_k, {warps, splits});
      const int bytes = Layout::bytes(warps, stages, splits, heads);
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
