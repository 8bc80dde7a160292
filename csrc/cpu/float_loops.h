#pragma once

// The float loops of hot_loops.h, compiled once per instruction set (simd.h says how).

#include <type_traits>

#include "cpu/hot_loops.h"
#include "cpu/simd.h"

namespace hata {
namespace {

// Calls body with data as a pointer to its element type.
template <class Body>
inline void with_type(const void* data, DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) {
    body(static_cast<const float*>(data));
  } else if (dtype == DType::kFloat16) {
    body(static_cast<const Float16*>(data));
  } else {
    body(static_cast<const BFloat16*>(data));
  }
}

// Calls body with a null pointer to the element type of cached rows.
template <class Body>
inline void with_row_type(DType dtype, const Body& body) {
  if (dtype == DType::kFloat8E4M3) {
    body(static_cast<const Float8*>(nullptr));
  } else {
    with_type(nullptr, dtype, body);
  }
}

void to_float(const void* data, DType dtype, int n, float* values) {
  with_type(data, dtype, [&](const auto* typed) {
    for (int i = 0; i < n; i += kLanes) store_until(values, i, n, load_until(typed, i, n));
  });
}

float sum_squares(const float* values, int n) {
  FloatVec sum = broadcast(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const FloatVec value = load_until(values, i, n);
    sum = multiply_add(value, value, sum);
  }
  return sum_lanes(sum);
}

// project for kRows rows and the 32 columns of one code word. Each output is one chain of
// multiply-adds over head_dim, so that it does not depend on kRows.
template <int kRows, class T>
inline void project_word(const float* rows, int head_dim, const T* weights, int num_bits,
                         float* out) {
  constexpr int kVecs = kWordBits / kLanes;
  FloatVec sums[kRows][kVecs];
  for (auto& row : sums) {
    for (auto& sum : row) sum = broadcast(0.0f);
  }
  for (int d = 0; d < head_dim; ++d) {
    const T* weight_row = weights + static_cast<int64_t>(d) * num_bits;
    FloatVec columns[kVecs];
    for (int v = 0; v < kVecs; ++v) columns[v] = load(weight_row + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const FloatVec x = broadcast(rows[static_cast<int64_t>(r) * head_dim + d]);
      for (int v = 0; v < kVecs; ++v) sums[r][v] = multiply_add(x, columns[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      store(out + static_cast<int64_t>(r) * num_bits + v * kLanes, sums[r][v]);
    }
  }
}

template <int kRows, class T>
inline void project_rows(const float* rows, int head_dim, const T* weights, int num_bits,
                         float* out) {
  for (int bit = 0; bit < num_bits; bit += kWordBits) {
    project_word<kRows>(rows, head_dim, weights + bit, num_bits, out + bit);
  }
}

void project(const float* rows, int n, int head_dim, const void* weights, DType dtype, int num_bits,
             float* out) {
  with_type(weights, dtype, [&](const auto* typed) {
    int r = 0;
    for (; r + kRegisterRows <= n; r += kRegisterRows) {
      project_rows<kRegisterRows>(rows + static_cast<int64_t>(r) * head_dim, head_dim, typed,
                                  num_bits, out + static_cast<int64_t>(r) * num_bits);
    }
    for (; r < n; ++r) {
      project_rows<1>(rows + static_cast<int64_t>(r) * head_dim, head_dim, typed, num_bits,
                      out + static_cast<int64_t>(r) * num_bits);
    }
  });
}

// The products of kHeads query heads and kRows rows, [kHeads, kRows].
template <int kHeads, int kRows, class T>
inline void dot_block(const float* q, int head_dim, const T* const (&rows)[kRows],
                      float (&products)[kRows][4]) {
  FloatVec sums[kRows][4];
  for (auto& row : sums) {
    for (auto& sum : row) sum = broadcast(0.0f);
  }
  for (int d = 0; d < head_dim; d += kLanes) {
    FloatVec columns[kRows];
    for (int r = 0; r < kRows; ++r) columns[r] = load_until(rows[r], d, head_dim);
    for (int g = 0; g < kHeads; ++g) {
      const FloatVec x = load_until(q + static_cast<int64_t>(g) * head_dim, d, head_dim);
      for (int r = 0; r < kRows; ++r) sums[r][g] = multiply_add(x, columns[r], sums[r][g]);
    }
  }
  for (int r = 0; r < kRows; ++r) sum_lanes4(sums[r], products[r]);
}

template <int kHeads, int kRows, class T>
inline void dot_heads(const float* q, int head_dim, const void* const* rows, float* out,
                      int out_stride) {
  const T* typed_rows[kRows];
  for (int r = 0; r < kRows; ++r) typed_rows[r] = static_cast<const T*>(rows[r]);
  float products[kRows][4];
  dot_block<kHeads>(q, head_dim, typed_rows, products);
  for (int g = 0; g < kHeads; ++g) {
    for (int r = 0; r < kRows; ++r) out[static_cast<int64_t>(g) * out_stride + r] = products[r][g];
  }
}

template <int kRows, class T>
inline void dot_group(const float* q, int group, int head_dim, const void* const* rows, float* out,
                      int out_stride) {
  int g = 0;
  for (; g + 4 <= group; g += 4) {
    dot_heads<4, kRows, T>(q + static_cast<int64_t>(g) * head_dim, head_dim, rows,
                           out + static_cast<int64_t>(g) * out_stride, out_stride);
  }
  for (; g < group; ++g) {
    dot_heads<1, kRows, T>(q + static_cast<int64_t>(g) * head_dim, head_dim, rows,
                           out + static_cast<int64_t>(g) * out_stride, out_stride);
  }
}

inline void prefetch_row(const void* row, int64_t size) {
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

void dot_rows(const float* q, int group, int head_dim, const void* const* rows,
              const void* const* next_rows, int n, DType dtype, float* out, int out_stride) {
  constexpr int kAhead = 8;  // rows
  with_row_type(dtype, [&](const auto* typed) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>;
    const int64_t row_size = head_dim * static_cast<int64_t>(sizeof(T));
    for (int r = 0; r < n && r < kAhead; ++r) prefetch_row(rows[r], row_size);
    int r = 0;
    for (; r + 2 <= n; r += 2) {
      for (int i = r; i < r + 2; ++i) {
        if (i + kAhead < n) prefetch_row(rows[i + kAhead], row_size);
        prefetch_row(next_rows[i], row_size);
      }
      dot_group<2, T>(q, group, head_dim, rows + r, out + r, out_stride);
    }
    if (r < n) {
      prefetch_row(next_rows[r], row_size);
      dot_group<1, T>(q, group, head_dim, rows + r, out + r, out_stride);
    }
  });
}

// add_weighted_rows for kHeads heads and kVecs vectors of the rows, which end at head_dim.
template <int kHeads, int kVecs, class T>
inline void add_weighted_columns(const float* weights, int weight_stride, int head_dim,
                                 const void* const* rows, int n, int d, float* acc) {
  FloatVec sums[kHeads][kVecs];
  for (int g = 0; g < kHeads; ++g) {
    for (int v = 0; v < kVecs; ++v) {
      sums[g][v] = load_until(acc + static_cast<int64_t>(g) * head_dim, d + v * kLanes, head_dim);
    }
  }
  for (int r = 0; r < n; ++r) {
    const T* row = static_cast<const T*>(rows[r]);
    FloatVec columns[kVecs];
    for (int v = 0; v < kVecs; ++v) columns[v] = load_until(row, d + v * kLanes, head_dim);
    for (int g = 0; g < kHeads; ++g) {
      const FloatVec weight = broadcast(weights[static_cast<int64_t>(g) * weight_stride + r]);
      for (int v = 0; v < kVecs; ++v) sums[g][v] = multiply_add(weight, columns[v], sums[g][v]);
    }
  }
  for (int g = 0; g < kHeads; ++g) {
    for (int v = 0; v < kVecs; ++v) {
      store_until(acc + static_cast<int64_t>(g) * head_dim, d + v * kLanes, head_dim, sums[g][v]);
    }
  }
}

template <int kHeads, class T>
inline void add_weighted(const float* weights, int weight_stride, int head_dim,
                         const void* const* rows, int n, float* acc) {
  int d = 0;
  for (; d + kRegisterVecs * kLanes <= head_dim; d += kRegisterVecs * kLanes) {
    add_weighted_columns<kHeads, kRegisterVecs, T>(weights, weight_stride, head_dim, rows, n, d,
                                                   acc);
  }
  for (; d < head_dim; d += kLanes) {
    add_weighted_columns<kHeads, 1, T>(weights, weight_stride, head_dim, rows, n, d, acc);
  }
}

void add_weighted_rows(const float* weights, int weight_stride, int group, int head_dim,
                       const void* const* rows, int n, DType dtype, float* acc) {
  with_row_type(dtype, [&](auto* typed) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>;
    int g = 0;
    for (; g + 4 <= group; g += 4) {
      add_weighted<4, T>(weights + static_cast<int64_t>(g) * weight_stride, weight_stride, head_dim,
                         rows, n, acc + static_cast<int64_t>(g) * head_dim);
    }
    for (; g < group; ++g) {
      add_weighted<1, T>(weights + static_cast<int64_t>(g) * weight_stride, weight_stride, head_dim,
                         rows, n, acc + static_cast<int64_t>(g) * head_dim);
    }
  });
}

}  // namespace
}  // namespace hata
