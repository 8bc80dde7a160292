#include "cpu/select_row.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace hata {
namespace {

constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;

// Which keys of a range are selected: those above `key`, and the last of those equal to it.
template <class Key>
struct Cut {
  Key key;
  int num_skipped;  // keys equal to `key` that are left out, the earliest ones
};

// The cut that selects `wanted` of n keys, 0 < wanted <= n. Every pass counts the keys of the
// remaining interval [low, high] in kBins equal bins and keeps the bin that the cut falls in.
template <class Key>
Cut<Key> find_cut(const Key* keys, int n, int wanted) {
  Key low = keys[0], high = keys[0];
  for (int i = 1; i < n; ++i) {
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  while (true) {
    const Key span = static_cast<Key>(high - low);
    const int shift = std::max(0, static_cast<int>(std::bit_width(span)) - kBinBits);
    int counts[kBins] = {};
    for (int i = 0; i < n; ++i) {
      const Key offset = static_cast<Key>(keys[i] - low);
      if (offset <= span) ++counts[offset >> shift];
    }
    int bin = static_cast<int>(span >> shift);
    while (counts[bin] < wanted) wanted -= counts[bin--];
    low = static_cast<Key>(low + (static_cast<Key>(bin) << shift));
    if (shift == 0) return {low, counts[bin] - wanted};
    high = std::min(high, static_cast<Key>(low + ((Key{1} << shift) - 1)));
  }
}

}  // namespace

template <class Key>
int select_row(const Key* keys, int visible, int top_k, int num_sink, int num_recent,
               int32_t* indices) {
  const int count = std::min(visible, top_k);
  std::fill(indices + count, indices + top_k, -1);
  if (visible <= top_k) {
    std::iota(indices, indices + count, 0);
    return count;
  }
  const int middle_end = visible - num_recent;
  const int wanted = top_k - num_sink - num_recent;
  std::iota(indices, indices + num_sink, 0);
  int32_t* next = indices + num_sink;
  if (wanted > 0) {
    Cut<Key> cut = find_cut(keys + num_sink, middle_end - num_sink, wanted);
    for (int t = num_sink; t < middle_end; ++t) {
      if (keys[t] < cut.key || (keys[t] == cut.key && cut.num_skipped-- > 0)) continue;
      *next++ = t;
    }
  }
  std::iota(next, next + num_recent, middle_end);
  return count;
}

template int select_row(const uint16_t*, int, int, int, int, int32_t*);
template int select_row(const uint32_t*, int, int, int, int, int32_t*);

}  // namespace hata
