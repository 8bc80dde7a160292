// The CUDA side of a build without nvcc: every op says what is missing.

#include "decode_step.h"
#include "dense_attention.h"
#include "fetch_rows.h"
#include "hamming_score.h"
#include "hash_encode.h"
#include "merge_attention_states.h"
#include "select_topk.h"

#include <stdexcept>
#include <string>

namespace hata {
namespace {

[[noreturn]] void fail(const char* op) {
  throw std::runtime_error(std::string("hata::") + op +
                           ": tensors must be on the CPU, got CUDA tensors and a hata that was "
                           "built without CUDA; reinstall it where nvcc is found");
}

}  // namespace

void hash_encode_cuda(const HashEncodeParams&, CudaStream) {
  fail("hash_encode");
}
void encode_query_cuda(const EncodeQueryParams&, CudaStream) {
  fail("encode_query");
}
void cache_append_cuda(const CacheAppendParams&, CudaStream) {
  fail("cache_append");
}
void hamming_score_cuda(const HammingScoreParams&, CudaStream) {
  fail("hamming_score");
}
void select_topk_cuda(const SelectTopkParams&, CudaStream) {
  fail("select_topk");
}
void score_select_cuda(const ScoreSelectParams&, CudaStream) {
  fail("score_select");
}
void fetch_rows_cuda(const FetchRowsParams&, CudaStream) {
  fail("fetch_rows");
}
void gather_attention_cuda(const GatherAttentionParams&, CudaStream) {
  fail("gather_attention");
}
void dense_attention_cuda(const DenseAttentionParams&, CudaStream) {
  fail("dense_attention");
}
void merge_attention_states_cuda(const MergeAttentionStatesParams&, CudaStream) {
  fail("merge_attention_states");
}
void decode_step_cuda(const DecodeStepParams&, CudaStream) {
  fail("decode_step");
}

}  // namespace hata
