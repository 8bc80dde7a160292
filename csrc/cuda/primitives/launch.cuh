#pragma once

#include <cooperative_groups.h>

#include <map>
#include <mutex>
#include <utility>

#include "cuda/primitives/check.h"
#include "cuda/primitives/cluster.cuh"
#include "hash_code.h"

namespace hata {

struct LaunchShape {
  dim3 grid;
  int threads;
  int shared_bytes = 0;
  // Blocks of a cluster, along x; 0: the kernel knows no clusters. One that sends (st.async) must
  // be launched in clusters even of one block, or it traps.
  int cluster_size = 0;
  // The kernel calls wait_for_previous_kernel() before it touches what the kernel before it in the
  // stream writes, so that its launch may overlap with that kernel's end.
  bool overlaps_previous = false;
  // All blocks are resident at once, or the launch fails: they may wait for each other.
  bool is_cooperative = false;
};

inline int current_device(const char* op) {
  int device;
  cuda_check(cudaGetDevice(&device), op);
  return device;
}

inline int device_attribute(cudaDeviceAttr attribute, const char* op) {
  int value;
  cuda_check(cudaDeviceGetAttribute(&value, attribute, current_device(op)), op);
  return value;
}

// Whether the device runs a version of the kernel that was compiled for GPUs with clusters (sm_90).
// A slow question, to be asked once.
template <typename Kernel>
bool compiled_for_clusters(Kernel kernel, const char* op) {
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, kernel), op);
  return attributes.ptxVersion >= 90;
}

// Returns how many clusters of such blocks the device holds at once. A slow question, to be asked
// once.
template <typename Kernel>
int max_active_clusters(Kernel kernel, int threads, int shared_bytes, int cluster_size,
                        const char* op) {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster_size);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  cuda_check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), op);
  return clusters;
}

// Lets a kernel have that much dynamic shared memory; returns whether the device has as much. The
// runtime is told only where a kernel wants more than it has had on that device.
template <typename Kernel>
bool allow_shared_memory(Kernel kernel, int bytes, const char* op) {
  constexpr int kWithoutAsking = 48 * 1024;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> allowed;
  if (bytes <= kWithoutAsking) return true;
  const std::lock_guard lock(mutex);
  int& most = allowed[{current_device(op), reinterpret_cast<const void*>(kernel)}];
  if (bytes <= most) return true;
  if (bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, op)) return false;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), op);
  most = bytes;
  return true;
}

template <typename... Params, typename... Args>
void launch_kernel(void (*kernel)(Params...), const LaunchShape& shape, CudaStream stream,
                   const char* op, Args&&... args) {
  allow_shared_memory(kernel, shape.shared_bytes, op);
  cudaLaunchAttribute attributes[3];
  unsigned num_attributes = 0;
  if (shape.cluster_size > 0) {
    cudaLaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster_size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (shape.overlaps_previous && device_attribute(cudaDevAttrComputeCapabilityMajor, op) >= 9) {
    cudaLaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.is_cooperative) {
    cudaLaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  cuda_check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), op);
}

// Returns once the kernel before this one has finished and its writes are visible. Nothing to do
// where launches do not overlap.
__device__ __forceinline__ void wait_for_previous_kernel() {
  if constexpr (kIsSm90) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next kernel be launched while this one still runs.
__device__ __forceinline__ void let_next_kernel_launch() {
  if constexpr (kIsSm90) asm volatile("griddepcontrol.launch_dependents;");
}

// The two halves of a barrier of all blocks of a cooperative launch, whose counter the driver
// keeps, each by a whole block. What a block has written before it arrives is seen by those that
// have waited; one that has nothing to wait for may end.
using GridArrival = cooperative_groups::grid_group::arrival_token;
__device__ __forceinline__ GridArrival arrive_at_grid_barrier() {
  return cooperative_groups::this_grid().barrier_arrive();
}
__device__ __forceinline__ void wait_at_grid_barrier(GridArrival& arrival) {
  cooperative_groups::this_grid().barrier_wait(std::move(arrival));
}

}  // namespace hata
