#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "hash_code.h"

namespace hata {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One dimension of an expected shape; without a size, any size is accepted.
struct Dim {
  const char* name;
  int64_t size = -1;
};

// A part of a message: itself, or what a callable returns. A message takes longer to compose than a
// check, so that what is composed comes as a callable.
template <typename Part>
decltype(auto) message_part(const Part& part) {
  if constexpr (std::is_invocable_v<const Part&>) {
    return part();
  } else {
    return part;
  }
}

// Checks the arguments of one op; every message reads "hata::<op>: <arg> must <rule>, got <value>".
// All tensors must lie on the device of the first one.
class ArgumentChecks {
 public:
  ArgumentChecks(const char* op, const Tensor& first, const char* first_name)
      : op_(op), first_(first), first_name_(first_name), on_cuda_(first.is_cuda()) {}

  bool on_cuda() const { return on_cuda_; }

  void dtype_and_device(const Tensor& t, const char* name, ScalarType dtype) const;

  // Device, dtype and shape. Every size fits an int32.
  void tensor(const Tensor& t, const char* name, ScalarType dtype,
              std::initializer_list<Dim> dims) const;

  // float16, bfloat16 or (on CPU) float32.
  DType float_dtype(const Tensor& t, const char* name) const;

  // The same, or float8_e4m3fn.
  DType row_dtype(const Tensor& t, const char* name) const;

  // The last `num_dims` dimensions lie densely, as in a contiguous tensor.
  void last_dims_contiguous(const Tensor& t, const char* name, int num_dims) const;

  // On CUDA: every row (all dimensions but the last fixed) starts at a multiple of 16 bytes.
  void rows_aligned(const Tensor& t, const char* name) const;

  // A multiple of 8 up to 512 on CPU; 64, 96, 128, 192, 256 or 512 on CUDA.
  void head_dim(int64_t value) const;

  void contiguous(const Tensor& t, const char* name) const;

  void in_range(int64_t value, const char* name, int64_t low, int64_t high) const;

  // `holds`, or "hata::<op>: <name> must <rule>, got <got>".
  template <typename Rule, typename Got>
  void rule(bool holds, const char* name, const Rule& rule, const Got& got) const {
    STD_TORCH_CHECK(holds, "hata::", op_, ": ", name, " must ", message_part(rule), ", got ",
                    message_part(got));
  }

 private:
  const char* op_;
  Tensor first_;
  const char* first_name_;
  bool on_cuda_;
};

inline constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

ScalarType scalar_type(DType dtype);

}  // namespace hata
