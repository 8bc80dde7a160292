#include "cpu/select_row.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace hata {
namespace {

// The cut that selects `wanted` of n ranks, 0 < wanted <= n. Every pass counts the ranks of the
// remaining interval [low, high] in kSelectBins equal bins and keeps the bin that the cut falls in.
template <class Rank>
RowCut<Rank> find_cut(const RankLoops<Rank>& loops, const Rank* ranks, int n, int wanted) {
  Rank low, high;
  loops.range(ranks, n, &low, &high);
  int counts[kSelectBins];
  while (true) {
    const Rank span = static_cast<Rank>(high - low);
    const int shift = std::max(0, static_cast<int>(std::bit_width(span)) - kSelectBinBits);
    loops.count(ranks, n, low, span, shift, counts);
    int bin = static_cast<int>(span >> shift);
    while (counts[bin] < wanted) wanted -= counts[bin--];
    low = static_cast<Rank>(low + (static_cast<Rank>(bin) << shift));
    if (shift == 0) return {low, counts[bin], counts[bin] - wanted};
    const Rank width = static_cast<Rank>((Rank{1} << shift) - 1);
    high = high - low > width ? static_cast<Rank>(low + width) : high;
  }
}

}  // namespace

template <class Rank>
RowCut<Rank> select_row(const RankLoops<Rank>& loops, const Rank* ranks, int visible, int top_k,
                        int num_sink, int num_recent, int32_t* indices) {
  const int count = std::min(visible, top_k);
  std::fill(indices + count, indices + top_k, -1);
  if (visible <= top_k) {
    std::iota(indices, indices + count, 0);
    return {};
  }
  const int n = visible - num_sink - num_recent;
  const int wanted = top_k - num_sink - num_recent;
  std::iota(indices, indices + num_sink, 0);
  int32_t* next = indices + num_sink;
  RowCut<Rank> cut;
  if (wanted > 0) {
    cut = find_cut(loops, ranks + num_sink, n, wanted);
    next = loops.collect(ranks + num_sink, n, cut.last_rank, cut.num_skipped, num_sink, next);
  }
  std::iota(next, next + num_recent, visible - num_recent);
  return cut;
}

template RowCut<uint16_t> select_row(const RankLoops<uint16_t>&, const uint16_t*, int, int, int,
                                     int, int32_t*);
template RowCut<uint32_t> select_row(const RankLoops<uint32_t>&, const uint32_t*, int, int, int,
                                     int, int32_t*);

}  // namespace hata
