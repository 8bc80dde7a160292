#include "fetch_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"

namespace hata {
namespace {

// Fetches the rows of one sequence and KV head.
class ListFetcher {
 public:
  ListFetcher(const FetchRowsParams& p, int batch_idx, int kv_head_idx)
      : p_(p),
        batch_idx_(batch_idx),
        kv_head_idx_(kv_head_idx),
        pair_(int64_t{batch_idx} * p.cache.num_kv_heads + kv_head_idx),
        indices_(p.indices + pair_ * p.top_k),
        slots_(p.slots + pair_ * p.top_k),
        position_of_slot_(p.rows.position_of_slot + pair_ * p.rows.num_slots),
        referenced_(p.rows.referenced + pair_ * p.rows.num_slots),
        in_use_(p.rows.num_slots) {}

  void fetch() {
    int32_t* missing = p_.missing + pair_ * p_.top_k;
    int num_missing = 0;
    for (int i = 0; i < p_.top_k; ++i) {
      const int t = indices_[i];
      const bool in_sight = t >= 0 && t < seq_len_of(p_.table, batch_idx_);
      const bool exists = in_sight && page_of(p_.table, batch_idx_, t) >= 0;
      slots_[i] = exists ? cached_slot(t) : -1;
      if (exists && slots_[i] < 0) missing[num_missing++] = i;
    }
    int32_t& hand = p_.rows.hand[pair_];
    if (hand < 0 || hand >= p_.rows.num_slots) hand = 0;
    for (int m = 0; m < num_missing; ++m) {
      const int slot = give_up_slot(hand);
      slots_[missing[m]] = slot;
      take_in(indices_[missing[m]], slot);
    }
    std::fill(missing + num_missing, missing + p_.top_k, -1);
    p_.num_missing[pair_] = num_missing;
  }

 private:
  int32_t& hint(int t) const {
    const int page = page_of(p_.table, batch_idx_, t);
    return p_.rows.slot_of_row[hint_offset(p_, page, row_of(p_.table, t), kv_head_idx_)];
  }

  void use(int slot) {
    referenced_[slot] = 1;
    in_use_[slot] = true;
  }

  // Returns the slot that holds a position, which is now in use, or -1.
  int cached_slot(int t) {
    const int slot = hint(t);
    if (slot < 0 || slot >= p_.rows.num_slots || position_of_slot_[slot] != t) return -1;
    use(slot);
    return slot;
  }

  // Moves the hand past the next slot that nobody needs, and returns that slot.
  int give_up_slot(int32_t& hand) {
    while (true) {
      const int slot = hand;
      hand = (hand + 1) % p_.rows.num_slots;
      if (in_use_[slot]) continue;
      if (!referenced_[slot]) return slot;
      referenced_[slot] = 0;
    }
  }

  void take_in(int t, int slot) {
    use(slot);
    position_of_slot_[slot] = t;
    hint(t) = slot;
    const KvCache& c = p_.cache;
    const RowCache& r = p_.rows;
    const int64_t page = page_of(p_.table, batch_idx_, t), row = row_of(p_.table, t);
    const int64_t b = batch_idx_, h = kv_head_idx_;
    copy(c.k, page * c.k_page_stride + row * c.k_token_stride + h * c.k_head_stride, r.k,
         b * r.k_batch_stride + slot * r.k_slot_stride + h * r.k_head_stride);
    copy(c.v, page * c.v_page_stride + row * c.v_token_stride + h * c.v_head_stride, r.v,
         b * r.v_batch_stride + slot * r.v_slot_stride + h * r.v_head_stride);
  }

  void copy(const void* from, int64_t from_idx, void* to, int64_t to_idx) const {
    const int64_t size = p_.element_bytes;
    std::memcpy(static_cast<char*>(to) + to_idx * size,
                static_cast<const char*>(from) + from_idx * size,
                static_cast<size_t>(p_.cache.head_dim * size));
  }

  const FetchRowsParams& p_;
  const int batch_idx_, kv_head_idx_;
  const int64_t pair_;
  const int32_t* indices_;
  int32_t* slots_;
  int32_t* position_of_slot_;
  uint8_t* referenced_;
  std::vector<bool> in_use_;
};

}  // namespace

void fetch_rows_cpu(const FetchRowsParams& p) {
  const int num_kv_heads = p.cache.num_kv_heads;
  parallel_for(int64_t{p.table.batch} * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      ListFetcher(p, static_cast<int>(pair / num_kv_heads), static_cast<int>(pair % num_kv_heads))
          .fetch();
    }
  });
}

}  // namespace hata
