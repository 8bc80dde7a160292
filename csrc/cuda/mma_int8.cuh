#pragma once

#include <cstdint>

// A product of 8-bit integers, d += a b, on the tensor cores of sm_80 and newer. With r = lane / 4
// and c = lane % 4, a thread holds of A, 16 rows, unsigned: columns 4c.. of rows r and r + 8, then
// columns 16 + 4c.. of both; of B, 8 columns, signed: rows 4c.. and 16 + 4c.. of column r; of the
// result: {(r, 2c), (r, 2c + 1), (r + 8, 2c), (r + 8, 2c + 1)}.
namespace hata {

__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace hata
