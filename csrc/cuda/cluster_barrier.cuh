#pragma once

// The two halves of a barrier of a cluster's threads, for what need not be ordered with memory:
// that every block has begun, and may be sent to. Between them a thread does other work. Only where
// there are clusters (sm_90).
namespace hata {

__device__ __forceinline__ void arrive_at_cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_at_cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

}  // namespace hata
