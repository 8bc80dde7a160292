#pragma once

#include <cstdint>

// Products of bits, d[i][j] += popcount(a_i & b_j), on the tensor cores of sm_80 and newer. With r
// = lane / 4 and c = lane % 4, a thread holds of A, 16 rows: word c of rows r and r + 8 (of a
// product of 256 bits also word c + 4 of both); of B, 8 columns: word c (and c + 4) of column r; of
// the result: {(r, 2c), (r, 2c + 1), (r + 8, 2c), (r + 8, 2c + 1)}.
namespace hata {

__device__ __forceinline__ void mma_m16n8k128(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// a = {(r, c), (r + 8, c), (r, c + 4), (r + 8, c + 4)}, b = {c, c + 4}.
__device__ __forceinline__ void mma_m16n8k256(int (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace hata
