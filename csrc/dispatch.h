#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "hash_code.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#endif

namespace hata {

// Calls fn(std::integral_constant<int, V>{}) for the V in kValues that equals `value`.
template <int... kValues, typename Fn>
void dispatch_int(const char* name, int value, Fn&& fn) {
  const bool matched =
      ((value == kValues && (fn(std::integral_constant<int, kValues>{}), true)) || ...);
  if (!matched) {
    std::string supported;
    ((supported += (supported.empty() ? "" : ", ") + std::to_string(kValues)), ...);
    throw std::runtime_error(std::string(name) + " must be one of {" + supported + "}, got " +
                             std::to_string(value));
  }
}

#ifdef __CUDACC__
// Calls fn.template operator()<T>() with the CUDA element type of `dtype`.
template <typename Fn>
void dispatch_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat16:
      return fn.template operator()<__half>();
    case DType::kBFloat16:
      return fn.template operator()<__nv_bfloat16>();
    case DType::kFloat32:
      throw std::runtime_error("dtype must be float16 or bfloat16 on CUDA, got float32");
    case DType::kFloat8E4M3:
      throw std::runtime_error("dtype must be float16 or bfloat16 on CUDA, got float8");
  }
}

// The same for rows of K and V.
template <typename Fn>
void dispatch_row_dtype(DType dtype, Fn&& fn) {
  if (dtype == DType::kFloat8E4M3) return fn.template operator()<__nv_fp8_e4m3>();
  dispatch_dtype(dtype, fn);
}
#endif

}  // namespace hata
