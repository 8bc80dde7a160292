#pragma once

#include <cooperative_groups.h>

#include <cstdint>

// What the blocks of a cluster tell each other: a barrier of all their threads in two halves, and
// words that they store into each other's shared memory, whose bytes a barrier at the receiver
// counts, so that neither side needs a fence or waits for anything else.
namespace hata {

// Whether the compiler is making machine code for sm_90 or newer: clusters, stores into the memory
// of another block, launches that overlap. All functions below but the two halves of the barrier
// may be called only where it is. block_of_cluster() returns which of its cluster's blocks this one
// is, blocks_of_cluster() how many there are.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kIsSm90 = true;
__device__ __forceinline__ int block_of_cluster() {
  return cooperative_groups::this_cluster().block_rank();
}
__device__ __forceinline__ int blocks_of_cluster() {
  return cooperative_groups::this_cluster().num_blocks();
}
#else
inline constexpr bool kIsSm90 = false;
__device__ int block_of_cluster();
__device__ int blocks_of_cluster();
#endif

// Returns which cluster along grid x this block belongs to.
__device__ __forceinline__ int cluster_idx() {
  int idx;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(idx));
  return idx;
}

inline constexpr int kMaxCluster = 8;  // blocks: the largest that every GPU with clusters schedules

// The two halves of a barrier of a cluster's threads, for what need not be ordered with memory:
// that every block has begun, and may be sent to, or that it has used what it read from memory to
// which others then send. Between them a thread does other work. A barrier that orders memory would
// wait until all that a block has written is there (MEMBAR.GPU in machine code).
__device__ __forceinline__ void arrive_at_cluster_barrier() {
  if constexpr (kIsSm90) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_at_cluster_barrier() {
  if constexpr (kIsSm90) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Returns the address that something in shared memory has in another block of the cluster.
__device__ __forceinline__ uint32_t shared_address(const void* mine, int block) {
  uint32_t theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(theirs)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(mine))), "r"(block));
  return theirs;
}

// Counts the bytes that arrive in phases 0, 1, ..., in shared memory.
class ArrivalBarrier {
 public:
  // Initializes the barrier, by one thread, before it arrives at the cluster barrier that others
  // wait for before they send.
  __device__ void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // Says how many bytes a phase brings, by one thread, once for every phase; some may have arrived
  // already.
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
  }

  // Returns once all bytes of the phase are there.
  __device__ void wait(int phase) const {
    asm volatile(
        "{\n"
        ".reg .pred arrived;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 arrived, [%0], %1;\n"
        "@!arrived bra again;\n"
        "}" ::"r"(address()),
        "r"(phase % 2)
        : "memory");
  }

 private:
  __device__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state_));
  }

  uint64_t state_;
};

// Stores a word, or four, at `to` and counts them at `barrier`, both of which shared_address()
// gave.
__device__ __forceinline__ void send(uint32_t to, uint32_t word, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
      "r"(word), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void send(uint32_t to, const uint4& words, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(barrier)
      : "memory");
}

}  // namespace hata
