#include "select_topk.h"

#include <type_traits>

#include "cuda/primitives/check.h"
#include "cuda/primitives/warp.cuh"
#include "paged_cache.h"
#include "query_planes.h"
#include "selection.h"

namespace hata {
namespace {

constexpr int kThreads = 1024;
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;

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

// Finds, in a histogram of one digit, the digit of the `wanted`-th largest rank; returns it with
// how many ranks lie above it.
struct Cut {
  uint32_t digit;
  uint32_t above;
};

__device__ Cut find_cut(const uint32_t* histogram, uint32_t wanted) {
  __shared__ Cut cut;
  // Thread t looks at the t-th largest digit.
  const uint32_t digit = kBins - 1 - threadIdx.x;
  const uint32_t count = threadIdx.x < kBins ? histogram[digit] : 0;
  uint32_t total;
  const uint32_t above = block_exclusive_scan(count, total);
  if (above < wanted && wanted <= above + count) cut = {digit, above};
  __syncthreads();
  return cut;
}

// grid: batch * q_len * num_kv_heads; one block selects from one list of scores. Radix passes from
// the highest digit find the rank of the last selected position; one ordered pass then writes the
// positions above it and the most recent of those that equal it.
template <SelectDType kDType>
__global__ void __launch_bounds__(kThreads)
    select_topk_kernel(const __grid_constant__ SelectTopkParams p) {
  using Rank = Rank<kDType>;
  __shared__ uint32_t histogram[kBins];
  const int64_t list_idx = blockIdx.x;
  const int kv_head_idx = list_idx % p.num_kv_heads;
  const int j = list_idx / p.num_kv_heads % p.q_len;
  const int batch_idx = list_idx / p.num_kv_heads / p.q_len;
  const int seq_len = min(max(p.cache_seqlens[batch_idx], 0), p.max_seq_len);
  const int visible = visible_len(seq_len, p.q_len, j);
  const auto* scores = static_cast<const typename Rank::Stored*>(p.scores) +
                       batch_idx * p.score_batch_stride + j * p.score_token_stride +
                       kv_head_idx * p.score_head_stride;
  int32_t* indices = p.indices + list_idx * p.top_k;
  const int budget = budget_of(visible, p.top_k, p.min_top_k, p.top_k_share);
  const int num_selected = min(budget, visible);
  if (threadIdx.x == 0) p.num_selected[list_idx] = num_selected;
  for (int i = num_selected + threadIdx.x; i < p.top_k; i += kThreads) indices[i] = -1;
  if (visible <= budget) {
    for (int i = threadIdx.x; i < visible; i += kThreads) indices[i] = i;
    if (threadIdx.x == 0) Rank::write_cut(p, list_idx, 0, 0);
    return;
  }

  // More positions than the budget: the sinks and the recent ones do not overlap. The rest compete.
  const int first = p.num_sink, last = visible - p.num_recent;
  uint32_t wanted = budget - p.num_sink - p.num_recent;
  uint32_t prefix = 0;  // the digits of the last selected rank found so far
  if (wanted > 0) {
    for (int shift = Rank::kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
      for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
      __syncthreads();
      for (int t = first + threadIdx.x; t < last; t += kThreads) {
        const uint32_t rank = Rank::of(scores[t]);
        const bool matches = (static_cast<uint64_t>(rank) >> (shift + kDigitBits)) == prefix;
        if (matches) atomicAdd(&histogram[(rank >> shift) % kBins], 1u);
      }
      __syncthreads();
      const Cut cut = find_cut(histogram, wanted);
      wanted -= cut.above;
      prefix = prefix << kDigitBits | cut.digit;
    }
  }
  // `wanted` of the histogram[...] ranks that equal `prefix` are selected, the most recent ones.
  uint32_t ties = 0, ties_to_skip = 0;
  if (wanted > 0) {
    __syncthreads();
    ties = histogram[prefix % kBins];
    ties_to_skip = ties - wanted;
  }
  if (threadIdx.x == 0) Rank::write_cut(p, list_idx, prefix, static_cast<int32_t>(ties));

  uint32_t written = 0, ties_seen = 0;
  for (int tile = 0; tile < visible; tile += kThreads) {
    const int t = tile + threadIdx.x;
    const bool forced = t < visible && always_selected(t, visible, p.num_sink, p.num_recent);
    const bool competes = t < visible && !forced && budget > p.num_sink + p.num_recent;
    const uint32_t rank = competes ? Rank::of(scores[t]) : 0;
    const bool above = forced || (competes && rank > prefix);
    const bool tied = competes && rank == prefix;
    uint32_t total;
    const uint32_t before = block_exclusive_scan(
        static_cast<uint32_t>(tied) << 16 | static_cast<uint32_t>(above), total);
    const uint32_t ties_before = ties_seen + (before >> 16);
    if (above || (tied && ties_before >= ties_to_skip)) {
      const uint32_t ties_selected = max(ties_before, ties_to_skip) - max(ties_seen, ties_to_skip);
      indices[written + (before & 0xffff) + ties_selected] = t;
    }
    const uint32_t ties_after = ties_seen + (total >> 16);
    written += (total & 0xffff) + max(ties_after, ties_to_skip) - max(ties_seen, ties_to_skip);
    ties_seen = ties_after;
  }
}

template <SelectDType kDType>
void launch(const SelectTopkParams& p, CudaStream stream) {
  const int64_t lists = int64_t{p.batch} * p.q_len * p.num_kv_heads;
  if (lists == 0) return;
  select_topk_kernel<kDType><<<static_cast<unsigned>(lists), kThreads, 0, stream>>>(p);
  cuda_check(cudaGetLastError(), "hata::select_topk");
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
