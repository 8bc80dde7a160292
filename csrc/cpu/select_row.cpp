#include "cpu/select_row.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace hata {
namespace {

// Which keys are selected: those above `key`, and all but the first num_skipped of those equal to
// it.
template <class Key>
struct Cut {
  Key key;
  int num_skipped;
};

// The cut that selects `wanted` of n keys, 0 < wanted <= n. Every pass counts the keys of the
// remaining interval [low, high] in kSelectBins equal bins and keeps the bin that the cut falls in.
template <class Key>
Cut<Key> find_cut(const KeyLoops<Key>& loops, const Key* keys, int n, int wanted) {
  Key low, high;
  loops.range(keys, n, &low, &high);
  int counts[kSelectBins];
  while (true) {
    const Key span = static_cast<Key>(high - low);
    const int shift = std::max(0, static_cast<int>(std::bit_width(span)) - kSelectBinBits);
    loops.count(keys, n, low, span, shift, counts);
    int bin = static_cast<int>(span >> shift);
    while (counts[bin] < wanted) wanted -= counts[bin--];
    low = static_cast<Key>(low + (static_cast<Key>(bin) << shift));
    if (shift == 0) return {low, counts[bin] - wanted};
    const Key width = static_cast<Key>((Key{1} << shift) - 1);
    high = high - low > width ? static_cast<Key>(low + width) : high;
  }
}

}  // namespace

template <class Key>
int select_row(const KeyLoops<Key>& loops, const Key* keys, int visible, int top_k, int num_sink,
               int num_recent, int32_t* indices) {
  const int count = std::min(visible, top_k);
  std::fill(indices + count, indices + top_k, -1);
  if (visible <= top_k) {
    std::iota(indices, indices + count, 0);
    return count;
  }
  const int n = visible - num_sink - num_recent;
  const int wanted = top_k - num_sink - num_recent;
  std::iota(indices, indices + num_sink, 0);
  int32_t* next = indices + num_sink;
  if (wanted > 0) {
    const Cut<Key> cut = find_cut(loops, keys + num_sink, n, wanted);
    next = loops.collect(keys + num_sink, n, cut.key, cut.num_skipped, num_sink, next);
  }
  std::iota(next, next + num_recent, visible - num_recent);
  return count;
}

template int select_row(const KeyLoops<uint16_t>&, const uint16_t*, int, int, int, int, int32_t*);
template int select_row(const KeyLoops<uint32_t>&, const uint32_t*, int, int, int, int, int32_t*);

}  // namespace hata
