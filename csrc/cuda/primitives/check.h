#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace hata {

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

}  // namespace hata
