#include "select_topk.h"

#include <algorithm>
#include <bit>
#include <type_traits>
#include <utility>

#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/memo.h"
#include "cuda/primitives/warp.cuh"
#include "paged_cache.h"
#include "query_planes.h"
#include "selection.h"

// Radix passes from the highest digit find the rank of the last selected position; one ordered pass
// then writes the positions above it and the most recent of those that equal it. Where lists are
// few and long, several blocks share each: every block counts the digits of its slice, and what it
// has counted goes through the workspace.
namespace hata {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMinBlocks = 2;  // of a multiprocessor: one waits for memory while the other counts
constexpr int kPositions = 8;  // consecutive ones of a thread: 16 bytes of 16-bit scores
constexpr int kTile = kThreads * kPositions;
constexpr int kDigitBits = 10;
constexpr int kGroupBins = kWarpSize;
static_assert(SelectCounts::kBins == 1 << kDigitBits);
static_assert(SelectCounts::kGroups == kWarpSize && SelectCounts::kBins == kWarpSize * kGroupBins);

template <SelectDType kDType>
struct Rank {
  using Stored =
      std::conditional_t<kDType == SelectDType::kInt32 || kDType == SelectDType::kFloat32, uint32_t,
                         uint16_t>;
  static constexpr int kBits = 8 * sizeof(Stored);

  __device__ static uint32_t of(Stored stored) {
    switch (kDType) {
      case SelectDType::kInt32:
        return ordered_rank_int32(static_cast<int32_t>(stored));
      case SelectDType::kFloat32:
        return ordered_rank_float32(stored);
      case SelectDType::kFloat16:
        return ordered_rank_float16(static_cast<uint16_t>(stored));
      case SelectDType::kMatches:
      case SelectDType::kRankFloat16:
        break;
    }
    return stored;
  }

  // Says how a list was cut: at this rank, with so many ties.
  __device__ static void write_cut(const SelectTopkParams& p, int64_t list_idx, uint32_t rank,
                                   int32_t ties) {
    switch (kDType) {
      case SelectDType::kInt32:
        return p.cut.write(list_idx, int32_of_rank(rank), ties);
      case SelectDType::kFloat32:
        return p.cut.write(list_idx, float32_of_rank(rank), ties);
      case SelectDType::kFloat16:
      case SelectDType::kRankFloat16:
        return p.cut.write(list_idx, float16_of_rank(static_cast<uint16_t>(rank)), ties);
      case SelectDType::kMatches:
        return p.cut.write(list_idx, score_of_matches(static_cast<int>(rank), p.max_matches), ties);
    }
  }
};

// The scores of consecutive positions that a thread reads at a time, as they are stored.
template <typename Stored>
struct Scores {
  static constexpr int kPerWord = sizeof(uint32_t) / sizeof(Stored);
  uint32_t words[kPositions / kPerWord];

  __device__ Stored operator[](int i) const {
    return static_cast<Stored>(words[i / kPerWord] >> i % kPerWord * 8 * sizeof(Stored));
  }
};

// Returns a bit for each of a thread's positions from t on that lies in [first, end).
__device__ __forceinline__ uint32_t bits_of_range(int t, int first, int end) {
  const int from = min(max(first - t, 0), kPositions), to = min(max(end - t, 0), kPositions);
  return (1u << to) - (1u << min(from, to));
}

// The positions of one list that a block selects from, whole tiles but for the end of the list.
template <typename Stored>
struct Slice {
  const Stored* scores;  // of the list
  int begin, end;

  // Loads the scores of this thread's positions in a tile; 0 from the slice's end on.
  __device__ __forceinline__ Scores<Stored> load(int tile) const {
    Scores<Stored> loaded{};
    constexpr int kWords = sizeof(loaded) / sizeof(uint32_t);
    const int t = tile + static_cast<int>(threadIdx.x) * kPositions;
    const Stored* from = scores + t;
    if (t <= end - kPositions && reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 piece = reinterpret_cast<const uint4*>(from)[i / 4];
        loaded.words[i] = piece.x, loaded.words[i + 1] = piece.y;
        loaded.words[i + 2] = piece.z, loaded.words[i + 3] = piece.w;
      }
      return loaded;
    }
#pragma unroll
    for (int i = 0; i < kPositions; ++i) {
      constexpr int kPerWord = Scores<Stored>::kPerWord;
      const uint32_t score = t < end - i ? from[i] : Stored{0};
      loaded.words[i / kPerWord] |= score << i % kPerWord * 8 * sizeof(Stored);
    }
    return loaded;
  }

  // Calls fn(t, scores) for this thread's positions from t on in every tile. `first` are those of
  // the first tile, and again when it returns: a pass asks for what the next one begins with, which
  // arrives while the block finds the cut.
  template <typename Fn>
  __device__ __forceinline__ void for_tiles(Scores<Stored>& first, const Fn& fn) const {
#pragma unroll 1
    for (int tile = begin; tile < end; tile += kTile) {
      const Scores<Stored> next = load(tile < end - kTile ? tile + kTile : begin);
      fn(tile + static_cast<int>(threadIdx.x) * kPositions, first);
      first = next;
    }
  }
};

// What all blocks of a list count in 32 places, and what the blocks before this one do.
struct Totals {
  uint32_t all[kWarpSize], before[kWarpSize];

  // Adds what `num_blocks` blocks, of which this one is `block`, have counted, by a whole thread
  // block whose Totals are zero; counts_of(i) are block i's. Barriers must come before and after.
  template <typename CountsOf>
  __device__ __forceinline__ void add(int num_blocks, int block, const CountsOf& counts_of) {
    const int lane = threadIdx.x % kWarpSize;
    uint32_t sum = 0, sum_before = 0;
#pragma unroll 4
    for (int i = threadIdx.x / kWarpSize; i < num_blocks; i += kWarps) {
      const uint32_t count = counts_of(i)[lane];
      sum += count;
      sum_before += i < block ? count : 0;
    }
    if (sum != 0) atomicAdd(&all[lane], sum);
    if (sum_before != 0) atomicAdd(&before[lane], sum_before);
  }
};

// The place of the `wanted`-th largest of what Totals count, what lies in it and above it.
struct Cut {
  uint32_t place;
  uint32_t above, above_before;
  uint32_t tied, tied_before;
};

// Finds it, by a whole warp.
__device__ __forceinline__ Cut find_cut(const Totals& totals, uint32_t wanted) {
  const int lane = threadIdx.x % kWarpSize;
  const int place = kWarpSize - 1 - lane;  // lane 0 has the highest
  const uint32_t count = totals.all[place], before = totals.before[place];
  const uint32_t reached = warp_inclusive_scan(count);
  const int at = __ffs(__ballot_sync(kFullMask, wanted <= reached)) - 1;
  return {.place = static_cast<uint32_t>(kWarpSize - 1 - at),
          .above = __shfl_sync(kFullMask, reached - count, at),
          .above_before = __reduce_add_sync(kFullMask, lane < at ? before : 0),
          .tied = __shfl_sync(kFullMask, count, at),
          .tied_before = __shfl_sync(kFullMask, before, at)};
}

// grid: batch * q_len * num_kv_heads * blocks_per_list, the blocks of a list one after another.
// With more than one block a list the launch is cooperative. Its blocks then wait for each other
// once for each digit, at the barrier that the driver keeps, so that the workspace need not be
// cleared: a block writes all that others read. Digits take turns in two halves of it, because a
// block may have gone on to the next digit while another still reads this one.
template <SelectDType kDType>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    select_topk_kernel(const __grid_constant__ SelectTopkParams p, int blocks_per_list,
                       int rank_bits) {
  using Rank = Rank<kDType>;
  using Stored = typename Rank::Stored;
  __shared__ SelectCounts counts;
  __shared__ Totals groups, bins;
  const int list_idx = blockIdx.x / blocks_per_list, block = blockIdx.x % blocks_per_list;
  const int kv_head_idx = list_idx % p.num_kv_heads;
  const int j = list_idx / p.num_kv_heads % p.q_len;
  const int batch_idx = list_idx / p.num_kv_heads / p.q_len;
  const int seq_len = min(max(p.cache_seqlens[batch_idx], 0), p.max_seq_len);
  const int visible = visible_len(seq_len, p.q_len, j);
  int32_t* indices = p.indices + int64_t{list_idx} * p.top_k;
  const int budget = budget_of(visible, p.top_k, p.min_top_k, p.top_k_share);
  const int num_selected = min(budget, visible);
  if (block == 0 && threadIdx.x == 0) p.num_selected[list_idx] = num_selected;
#pragma unroll 1
  for (int i = num_selected + block * kThreads + threadIdx.x; i < p.top_k;
       i += blocks_per_list * kThreads) {
    indices[i] = -1;
  }

  // With more positions than the budget, the sinks and the recent ones do not overlap, and the
  // positions [first, last) between them compete for what is left of it.
  const bool chooses = visible > budget;
  const int first = chooses ? p.num_sink : visible;
  const int last = chooses ? visible - p.num_recent : visible;
  uint32_t wanted = chooses ? budget - p.num_sink - p.num_recent : 0;
  const bool competes = wanted > 0;

  const int64_t length = int64_t{ceil_div(ceil_div(visible, kTile), blocks_per_list)} * kTile;
  const Slice<Stored> slice{.scores = static_cast<const Stored*>(p.scores) +
                                      batch_idx * p.score_batch_stride + j * p.score_token_stride +
                                      kv_head_idx * p.score_head_stride,
                            .begin = static_cast<int>(min(block * length, int64_t{visible})),
                            .end = static_cast<int>(min((block + 1) * length, int64_t{visible}))};
  Scores<Stored> scores = slice.load(slice.begin);

  uint32_t prefix = 0;  // the digits of the last selected rank found so far
  uint32_t above_before = min(slice.begin, first) + max(slice.begin - last, 0);
  uint32_t ties = 0, ties_to_skip = 0, ties_seen = 0;
  bool is_odd = false;  // the digit
#pragma unroll 1
  for (int bits = rank_bits; bits > 0; is_odd = !is_odd) {
    const int digit_bits = min(bits, kDigitBits);
    bits -= digit_bits;
    const uint32_t num_bins = 1u << digit_bits;
    __syncthreads();  // all have read what the last digit left
#pragma unroll
    for (int i = 0; i < SelectCounts::kBins; i += kThreads) counts.bins[i + threadIdx.x] = 0;
    if (threadIdx.x < kWarpSize) {
      groups.all[threadIdx.x] = groups.before[threadIdx.x] = 0;
      bins.all[threadIdx.x] = bins.before[threadIdx.x] = 0;
    }
    __syncthreads();
    if (competes) {
      slice.for_tiles(scores, [&](int t, const Scores<Stored>& of_thread) {
        const uint32_t competing = bits_of_range(t, first, last);
#pragma unroll
        for (int i = 0; i < kPositions; ++i) {
          const uint32_t bin = (Rank::of(of_thread[i]) >> bits) - (prefix << digit_bits);
          const bool is_counted = competing & 1u << i && bin < num_bins;
          // What is not counted goes where a sum will be written: sooner done than a branch.
          atomicAdd(is_counted ? &counts.bins[bin] : &counts.groups[0], 1u);
        }
      });
    }
    __syncthreads();
    const bool is_shared = blocks_per_list > 1;
    SelectCounts* const of_list =
        p.workspace + (is_odd ? gridDim.x : 0) + list_idx * blocks_per_list;
#pragma unroll
    for (int i = 0; i < SelectCounts::kBins; i += kThreads) {
      const int bin = i + static_cast<int>(threadIdx.x);
      const uint32_t count = counts.bins[bin];
      const uint32_t sum = __reduce_add_sync(kFullMask, count);
      if (bin % kGroupBins == 0) counts.groups[bin / kGroupBins] = sum;
      if (!is_shared) continue;
      of_list[block].bins[bin] = count;
      if (bin % kGroupBins == 0) of_list[block].groups[bin / kGroupBins] = sum;
    }
    if (is_shared) {
      GridArrival arrival = arrive_at_grid_barrier();
      wait_at_grid_barrier(arrival);
    } else {
      __syncthreads();
    }
    if (!competes) continue;
    const SelectCounts* const told = is_shared ? of_list : &counts;
    groups.add(blocks_per_list, block, [&](int i) { return told[i].groups; });
    __syncthreads();
    const Cut group = find_cut(groups, wanted);
    bins.add(blocks_per_list, block,
             [&](int i) { return told[i].bins + group.place * kGroupBins; });
    __syncthreads();
    const Cut bin = find_cut(bins, wanted - group.above);
    prefix = prefix << digit_bits | (group.place * kGroupBins + bin.place);
    wanted -= group.above + bin.above;
    above_before += group.above_before + bin.above_before;
    ties = bin.tied;
    ties_to_skip = ties - wanted;  // the most recent of them are selected
    ties_seen = bin.tied_before;
  }

  if (block == 0 && threadIdx.x == 0) {
    Rank::write_cut(p, list_idx, prefix, static_cast<int32_t>(ties));
  }
  uint32_t written = above_before + (max(ties_seen, ties_to_skip) - ties_to_skip);
  slice.for_tiles(scores, [&](int t, const Scores<Stored>& of_thread) {
    const uint32_t between = bits_of_range(t, first, last);
    uint32_t above = 0, tied = 0;
#pragma unroll
    for (int i = 0; i < kPositions; ++i) {
      const uint32_t rank = Rank::of(of_thread[i]);
      above |= rank > prefix ? 1u << i : 0;
      tied |= rank == prefix ? 1u << i : 0;
    }
    const uint32_t competing = competes ? between : 0;
    above = (above & competing) | (bits_of_range(t, 0, visible) & ~between);
    tied &= competing;
    uint32_t total;
    const uint32_t before = block_exclusive_scan(
        static_cast<uint32_t>(__popc(tied)) << 16 | static_cast<uint32_t>(__popc(above)), total);
    uint32_t ties_before = ties_seen + (before >> 16);
    uint32_t at =
        written + (before & 0xffff) + max(ties_before, ties_to_skip) - max(ties_seen, ties_to_skip);
    for (uint32_t rest = above | tied; rest != 0; rest &= rest - 1) {
      const int i = __ffs(rest) - 1;
      if (tied >> i & 1 && ties_before++ < ties_to_skip) continue;
      indices[at++] = t + i;
    }
    const uint32_t ties_after = ties_seen + (total >> 16);
    written += (total & 0xffff) + max(ties_after, ties_to_skip) - max(ties_seen, ties_to_skip);
    ties_seen = ties_after;
  });
}

// Blocks share a list where each then has that many tiles less: to tell each other what they have
// counted takes about as long.
constexpr int kTilesToSave = 4;

// Returns how many blocks share each list.
template <typename Kernel>
int choose_blocks_per_list(Kernel kernel, const SelectTopkParams& p, int64_t lists,
                           const char* op) {
  const int tiles = ceil_div(p.max_seq_len, kTile);
  if (tiles <= kTilesToSave) return 1;
  // The device is asked once: that is slow.
  static Memo<std::pair<int, const void*>, int> remembered;
  const int device = current_device(op);
  const int resident = remembered.get({device, reinterpret_cast<const void*>(kernel)}, [&] {
    int blocks = 0;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0), op);
    return std::min(blocks, kMinBlocks) * device_attribute(cudaDevAttrMultiProcessorCount, op);
  });
  const int64_t available = std::min(resident, kMaxSelectBlocks) / lists;
  if (available == 0) return 1;
  const int tiles_per_block =
      ceil_div(tiles, static_cast<int>(std::min<int64_t>(available, tiles)));
  return tiles - tiles_per_block < kTilesToSave ? 1 : ceil_div(tiles, tiles_per_block);
}

template <SelectDType kDType>
void launch(const SelectTopkParams& p, CudaStream stream) {
  constexpr const char* kOp = "hata::select_topk";
  const int64_t lists = int64_t{p.batch} * p.q_len * p.num_kv_heads;
  if (lists == 0) return;
  const auto kernel = select_topk_kernel<kDType>;
  const int blocks_per_list = choose_blocks_per_list(kernel, p, lists, kOp);
  const int rank_bits = kDType == SelectDType::kMatches
                            ? std::bit_width(static_cast<unsigned>(p.max_matches))
                            : Rank<kDType>::kBits;
  launch_kernel(kernel,
                {.grid = dim3(static_cast<unsigned>(lists * blocks_per_list)),
                 .threads = kThreads,
                 .is_cooperative = blocks_per_list > 1},
                stream, kOp, p, blocks_per_list, rank_bits);
}

}  // namespace

void select_topk_cuda(const SelectTopkParams& p, CudaStream stream) {
  switch (p.dtype) {
    case SelectDType::kInt32:
      return launch<SelectDType::kInt32>(p, stream);
    case SelectDType::kFloat16:
      return launch<SelectDType::kFloat16>(p, stream);
    case SelectDType::kFloat32:
      return launch<SelectDType::kFloat32>(p, stream);
    case SelectDType::kMatches:
      return launch<SelectDType::kMatches>(p, stream);
    case SelectDType::kRankFloat16:
      return launch<SelectDType::kRankFloat16>(p, stream);
  }
}

}  // namespace hata
