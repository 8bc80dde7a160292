#pragma once

#include <cstdint>

#include "hash_code.h"
#include "query_planes.h"

namespace hata {

// The bit planes of one query token and KV head (query_planes.h), as the scan wants them.
struct ScanPlanes {
  int num_words, num_planes;
  int max_matches;  // weight_sum num_bits, at most 255 * 256: matches fit 16 bits
  int weights[kMaxPlanes];
  uint32_t planes[kMaxPlanes][kMaxWords];
};

inline constexpr int kSelectBinBits = 11;
inline constexpr int kSelectBins = 1 << kSelectBinBits;

// The loops of the selection over n > 0 ordered ranks (selection.h), uint16_t or uint32_t.
template <class Rank>
struct RankLoops {
  // The lowest and the highest rank.
  void (*range)(const Rank* ranks, int n, Rank* low, Rank* high);

  // counts[bin], kSelectBins of them: the ranks in [low, low + span] with (rank - low) >> shift =
  // bin.
  void (*count)(const Rank* ranks, int n, Rank low, Rank span, int shift, int* counts);

  // Writes first + i for each rank i that is above cut, and for those equal to it but the first
  // num_skipped. Returns the end of what it wrote.
  int32_t* (*collect)(const Rank* ranks, int n, Rank cut, int num_skipped, int first,
                      int32_t* positions);
};

// The loops that the operators spend their time in, compiled once for each instruction set.
// Within one instruction set every sum has one order, whatever the batch: the same key always gives
// the same code.
struct HotLoops {
  // matches[t] = sum_p w_p (num_bits - popcount(codes[t] ^ planes[p])) of codes [n, num_words].
  void (*count_matches)(const ScanPlanes& planes, const uint32_t* codes, int n, uint16_t* matches);

  // scores[t] = float16(((2 matches[t] - max_matches) / num_bits) * norms[t]), float16 bits.
  void (*apply_norms)(const ScanPlanes& planes, const uint16_t* matches, const uint16_t* norms,
                      int n, uint16_t* scores);

  // values[i] = float32(data[i]), i < n.
  void (*to_float)(const void* data, DType dtype, int n, float* values);

  float (*sum_squares)(const float* values, int n);

  // out[r, i] = rows[r] . weights[:, i], with rows [n, head_dim] float32, weights
  // [head_dim, num_bits] of dtype and out [n, num_bits].
  void (*project)(const float* rows, int n, int head_dim, const void* weights, DType dtype,
                  int num_bits, float* out);

  // out[g, r] = q[g] . rows[r], with q [group, head_dim] float32, n rows of dtype at the given
  // addresses and out [group, out_stride]. Fetches next_rows into the cache meanwhile.
  void (*dot_rows)(const float* q, int group, int head_dim, const void* const* rows,
                   const void* const* next_rows, int n, DType dtype, float* out, int out_stride);

  // acc[g] += sum_r weights[g, r] rows[r], with weights [group, weight_stride] and acc
  // [group, head_dim].
  void (*add_weighted_rows)(const float* weights, int weight_stride, int group, int head_dim,
                            const void* const* rows, int n, DType dtype, float* acc);

  RankLoops<uint16_t> ranks16;
  RankLoops<uint32_t> ranks32;
};

// The loops for this process, chosen at the first call: those of the best instruction set that the
// CPU has, or of the one that the environment variable HATA_CPU_ISA names. Throws
// std::runtime_error where it names none that the CPU has.
const HotLoops& hot_loops();

}  // namespace hata
