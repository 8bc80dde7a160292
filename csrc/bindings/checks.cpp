#include "bindings/checks.h"

#include <algorithm>
#include <iterator>
#include <string>

namespace hata {
namespace {

std::string to_string(const Tensor& t) {
  std::string sizes;
  for (int64_t d = 0; d < t.dim(); ++d) {
    sizes.append(d == 0 ? "[" : ", ").append(std::to_string(t.size(d)));
  }
  return sizes.append("]");
}

std::string to_string(std::initializer_list<Dim> dims) {
  std::string text;
  for (const Dim& dim : dims) {
    text.append(text.empty() ? "[" : ", ").append(dim.name);
    if (dim.size != -1) text.append("=").append(std::to_string(dim.size));
  }
  return text.append("]");
}

std::string device_name(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

}  // namespace

void ArgumentChecks::dtype_and_device(const Tensor& t, const char* name, ScalarType dtype) const {
  const bool same_device =
      t.is_cuda() == on_cuda_ && (!on_cuda_ || t.get_device_index() == first_.get_device_index());
  rule(
      same_device, name,
      [&] {
        return std::string("be on the device of ") + first_name_ + " (" + device_name(first_) + ")";
      },
      [&] { return device_name(t); });
  rule(
      t.scalar_type() == dtype, name,
      [&] { return std::string("be ") + torch::headeronly::toString(dtype); },
      [&] { return torch::headeronly::toString(t.scalar_type()); });
}

void ArgumentChecks::tensor(const Tensor& t, const char* name, ScalarType dtype,
                            std::initializer_list<Dim> dims) const {
  dtype_and_device(t, name, dtype);
  bool matches = t.dim() == static_cast<int64_t>(dims.size());
  bool fits = true;
  int64_t d = 0;
  for (const Dim& dim : dims) {
    if (!matches) break;
    const int64_t size = t.size(d++);
    matches = dim.size == -1 || size == dim.size;
    fits = fits && size <= kMaxInt32;
  }
  const auto sizes = [&] { return to_string(t); };
  rule(matches, name, [&] { return "have shape " + to_string(dims); }, sizes);
  rule(fits, name, "have sizes below 2^31", sizes);
}

DType ArgumentChecks::float_dtype(const Tensor& t, const char* name) const {
  const ScalarType dtype = t.scalar_type();
  if (dtype == ScalarType::Half) return DType::kFloat16;
  if (dtype == ScalarType::BFloat16) return DType::kBFloat16;
  rule(dtype == ScalarType::Float && !on_cuda(), name,
       on_cuda() ? "be Half or BFloat16 on CUDA" : "be Half, BFloat16 or Float",
       torch::headeronly::toString(dtype));
  return DType::kFloat32;
}

DType ArgumentChecks::row_dtype(const Tensor& t, const char* name) const {
  const ScalarType dtype = t.scalar_type();
  if (dtype == ScalarType::Float8_e4m3fn) return DType::kFloat8E4M3;
  if (dtype == ScalarType::Half) return DType::kFloat16;
  if (dtype == ScalarType::BFloat16) return DType::kBFloat16;
  rule(dtype == ScalarType::Float && !on_cuda(), name,
       on_cuda() ? "be Half, BFloat16 or Float8_e4m3fn on CUDA"
                 : "be Half, BFloat16, Float or Float8_e4m3fn",
       torch::headeronly::toString(dtype));
  return DType::kFloat32;
}

void ArgumentChecks::last_dims_contiguous(const Tensor& t, const char* name, int num_dims) const {
  int64_t dense = 1;
  for (int64_t d = t.dim() - 1; d >= t.dim() - num_dims; --d) {
    const auto asked = [&] {
      return num_dims == 1
                 ? std::string("be contiguous in its last dimension")
                 : "be contiguous in its last " + std::to_string(num_dims) + " dimensions";
    };
    const auto got = [&] {
      return "stride " + std::to_string(t.stride(d)) + " in dimension " + std::to_string(d);
    };
    rule(t.size(d) <= 1 || t.stride(d) == dense, name, asked, got);
    dense *= t.size(d);
  }
}

void ArgumentChecks::rows_aligned(const Tensor& t, const char* name) const {
  if (!on_cuda() || t.numel() == 0) return;
  constexpr int64_t kBytes = 16;
  const int64_t size = static_cast<int64_t>(t.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % kBytes == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    aligned = aligned && (t.size(d) <= 1 || t.stride(d) * size % kBytes == 0);
  }
  rule(aligned, name, "have rows that start at multiples of 16 bytes", "other strides or offset");
}

void ArgumentChecks::head_dim(int64_t value) const {
  if (on_cuda()) {
    constexpr int kSupported[] = {64, 96, 128, 192, 256, 512};
    rule(std::ranges::find(kSupported, value) != std::end(kSupported), "head_dim",
         "be one of 64, 96, 128, 192, 256, 512 on CUDA", value);
  } else {
    rule(value > 0 && value <= 512 && value % 8 == 0, "head_dim", "be a multiple of 8 in 8..512",
         value);
  }
}

void ArgumentChecks::contiguous(const Tensor& t, const char* name) const {
  rule(t.is_contiguous(), name, "be contiguous", "other strides");
}

void ArgumentChecks::in_range(int64_t value, const char* name, int64_t low, int64_t high) const {
  rule(
      value >= low && value <= high, name,
      [&] { return "be in " + std::to_string(low) + ".." + std::to_string(high); }, value);
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat8E4M3:
      return ScalarType::Float8_e4m3fn;
    case DType::kFloat32:
      break;
  }
  return ScalarType::Float;
}

}  // namespace hata
