#pragma once

#include <cstdint>

// Words that the blocks of a cluster store into each other's shared memory (sm_90). A barrier at
// the receiver counts their bytes, so that neither side needs a fence or waits for anything else.
// Only kernels for sm_90 may call these.
namespace hata {

// The address of a block's copy of something in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* mine, int block) {
  uint32_t theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(theirs)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(mine))), "r"(block));
  return theirs;
}

// Counts the bytes that arrive in phases 0, 1, ...: expect() says how many a phase brings, and
// wait() returns once all of them are there.
class ArrivalBarrier {
 public:
  // By one thread, before it arrives at the cluster barrier that others wait for before they send.
  __device__ void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // By one thread, once for every phase; some may have arrived already.
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
  }

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
