#include "fetch_rows.h"

#include <algorithm>

#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/warp.cuh"

namespace hata {
namespace {

constexpr const char* kOp = "hata::fetch_rows";
constexpr int kFindThreads = 1024;
constexpr int kAtOnce = 4;  // entries, slots or pieces that a thread looks at before it goes on
constexpr int kFindStep = kFindThreads * kAtOnce;
constexpr int kCopyThreads = 256;
constexpr int kCopyStep = kCopyThreads * kAtOnce;
// Two blocks for each of an H100's multiprocessors: PCIe answers after microseconds, so that it
// takes many reads in flight.
constexpr int kCopyBlocks = 264;

// Where the row of position t is, or -1 where t is not in sight or has no page.
struct Row {
  int page, row;
};

__device__ __forceinline__ Row find_row(const PageTable& table, int batch_idx, int seq_len, int t) {
  if (t < 0 || t >= seq_len) return {-1, 0};
  return {page_of(table, batch_idx, t), row_of(table, t)};
}

__device__ __forceinline__ int wrapped(int slot, int num_slots) {
  return slot < num_slots ? slot : slot - num_slots;
}

// grid: batch * num_kv_heads. A block finds the slots of one list: first those of the rows that are
// cached, which it notes in a bitmap of slots in use; then, going round with the hand, a slot for
// each of the others. A thread looks at kAtOnce neighbouring entries or slots at once. With the
// registers that two blocks of a multiprocessor would have it spills for sm_80.
__global__ void __launch_bounds__(kFindThreads, 1)
    find_slots_kernel(const __grid_constant__ FetchRowsParams p) {
  extern __shared__ uint32_t in_use[];  // a bit a slot
  __shared__ int next_hand;
  const int64_t pair = blockIdx.x;
  const int batch_idx = pair / p.cache.num_kv_heads, kv_head_idx = pair % p.cache.num_kv_heads;
  const int num_slots = p.rows.num_slots, top_k = p.top_k;
  const int32_t* indices = p.indices + pair * top_k;
  int32_t* slots = p.slots + pair * top_k;
  int32_t* missing = p.missing + pair * top_k;
  int32_t* position_of_slot = p.rows.position_of_slot + pair * num_slots;
  uint8_t* referenced = p.rows.referenced + pair * num_slots;
  for (int i = threadIdx.x; i < ceil_div(num_slots, 32); i += kFindThreads) in_use[i] = 0;
  wait_for_previous_kernel();
  let_next_kernel_launch();
  const int seq_len = seq_len_of(p.table, batch_idx);
  __syncthreads();

  const auto hint = [&](const Row& row) -> int32_t& {
    return p.rows.slot_of_row[hint_offset(p, row.page, row.row, kv_head_idx)];
  };
  const auto use = [&](int slot) {
    referenced[slot] = 1;
    atomicOr(&in_use[slot / 32], 1u << slot % 32);
  };

  int num_missing = 0;
  for (int base = 0; base < top_k; base += kFindStep) {
    const int first = base + threadIdx.x * kAtOnce;
    int positions[kAtOnce], found[kAtOnce];
    Row rows[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) positions[u] = first + u < top_k ? indices[first + u] : -1;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      rows[u] = find_row(p.table, batch_idx, seq_len, positions[u]);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) found[u] = rows[u].page >= 0 ? hint(rows[u]) : -1;
    unsigned missed = 0;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const bool named = found[u] >= 0 && found[u] < num_slots;
      if (!named || position_of_slot[found[u]] != positions[u]) {
        found[u] = -1;
        missed |= static_cast<unsigned>(rows[u].page >= 0) << u;
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (found[u] >= 0) use(found[u]);
      if (first + u < top_k) slots[first + u] = found[u];
    }
    uint32_t total;
    int place = num_missing + block_exclusive_scan(__popc(missed), total);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (missed >> u & 1u) missing[place++] = first + u;
    }
    num_missing += total;
  }
  for (int m = num_missing + threadIdx.x; m < top_k; m += kFindThreads) missing[m] = -1;
  __syncthreads();  // the bitmap and the list of what is missing are complete

  int hand = p.rows.hand[pair];
  if (hand < 0 || hand >= num_slots) hand = 0;
  const int step = min(num_slots, kFindStep);  // no slot twice
  for (int taken = 0; taken < num_missing;) {
    const int first = threadIdx.x * kAtOnce;
    unsigned free = 0, marked = 0;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + u >= step) break;
      const int slot = wrapped(hand + first + u, num_slots);
      if (in_use[slot / 32] >> slot % 32 & 1u) continue;
      (referenced[slot] ? marked : free) |= 1u << u;
    }
    uint32_t total;
    int place = taken + block_exclusive_scan(__popc(free), total);
    // The hand passes the slots before the last that is given up.
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (place >= num_missing) break;
      const int slot = wrapped(hand + first + u, num_slots);
      if (marked >> u & 1u) referenced[slot] = 0;
      if (free >> u & 1u) {
        const int i = missing[place++];
        const int t = indices[i];
        use(slot);
        position_of_slot[slot] = t;
        hint(find_row(p.table, batch_idx, seq_len, t)) = slot;
        slots[i] = slot;
        if (place == num_missing) next_hand = wrapped(slot + 1, num_slots);
      }
    }
    taken += total;
    __syncthreads();  // in_use and next_hand are up to date
    hand = taken < num_missing ? wrapped(hand + step, num_slots) : next_hand;
  }
  if (threadIdx.x == 0) {
    p.rows.hand[pair] = hand;
    p.num_missing[pair] = num_missing;
  }
}

// 16 bytes of a row's key or value, in the pages and in the row cache.
struct Piece {
  const uint4* from;
  uint4* to;
};

// Pieces of a row's key, which are as many as of its value.
constexpr int pieces_of_key(const FetchRowsParams& p) {
  return p.cache.head_dim * p.element_bytes / static_cast<int>(sizeof(uint4));
}

// Returns piece `number` of a missing row: its key's pieces come first, then its value's.
__device__ __forceinline__ Piece piece_of(const FetchRowsParams& p, int64_t pair, int missing_idx,
                                          int number) {
  const int64_t batch_idx = pair / p.cache.num_kv_heads, kv_head_idx = pair % p.cache.num_kv_heads;
  const int i = p.missing[pair * p.top_k + missing_idx];
  const int t = p.indices[pair * p.top_k + i];
  const int64_t slot = p.slots[pair * p.top_k + i];
  const int64_t page = page_of(p.table, batch_idx, t), row = row_of(p.table, t);
  const int pieces = pieces_of_key(p);
  const auto at = [&](void* data, int64_t offset) {
    char* row = static_cast<char*>(data) + offset * p.element_bytes;
    return reinterpret_cast<uint4*>(row) + number % pieces;
  };
  const KvCache& c = p.cache;
  const RowCache& r = p.rows;
  if (number < pieces) {
    return {
        at(c.k, page * c.k_page_stride + row * c.k_token_stride + kv_head_idx * c.k_head_stride),
        at(r.k,
           batch_idx * r.k_batch_stride + slot * r.k_slot_stride + kv_head_idx * r.k_head_stride)};
  }
  return {at(c.v, page * c.v_page_stride + row * c.v_token_stride + kv_head_idx * c.v_head_stride),
          at(r.v, batch_idx * r.v_batch_stride + slot * r.v_slot_stride +
                      kv_head_idx * r.v_head_stride)};
}

// grid: batch * num_kv_heads * splits. The blocks of a list share its missing rows, in pieces of
// which a thread has kAtOnce in flight.
__global__ void __launch_bounds__(kCopyThreads)
    copy_rows_kernel(const __grid_constant__ FetchRowsParams p, int splits) {
  const int split = blockIdx.x % splits;
  const int64_t pair = blockIdx.x / splits;
  const int row_pieces = 2 * pieces_of_key(p);
  wait_for_previous_kernel();
  let_next_kernel_launch();
  const int pieces = p.num_missing[pair] * row_pieces;
  for (int base = split * kCopyStep; base < pieces; base += splits * kCopyStep) {
    uint4 data[kAtOnce];
    uint4* to[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = base + u * kCopyThreads + static_cast<int>(threadIdx.x);
      to[u] = nullptr;
      if (i >= pieces) continue;
      const Piece piece = piece_of(p, pair, i / row_pieces, i % row_pieces);
      data[u] = *piece.from;
      to[u] = piece.to;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (to[u] != nullptr) *to[u] = data[u];
    }
  }
}

}  // namespace

void fetch_rows_cuda(const FetchRowsParams& p, CudaStream stream) {
  const int64_t pairs = int64_t{p.table.batch} * p.cache.num_kv_heads;
  if (pairs == 0 || p.top_k == 0) return;
  launch_kernel(
      find_slots_kernel,
      {.grid = dim3(static_cast<unsigned>(pairs)),
       .threads = kFindThreads,
       .shared_bytes = ceil_div(p.rows.num_slots, 32) * static_cast<int>(sizeof(uint32_t)),
       .overlaps_previous = true},
      stream, kOp, p);
  const int most_pieces = p.top_k * 2 * pieces_of_key(p);
  const int splits =
      std::clamp(static_cast<int>(kCopyBlocks / pairs), 1, ceil_div(most_pieces, kCopyStep));
  launch_kernel(copy_rows_kernel,
                {.grid = dim3(static_cast<unsigned>(pairs * splits)),
                 .threads = kCopyThreads,
                 .overlaps_previous = true},
                stream, kOp, p, splits);
}

}  // namespace hata
