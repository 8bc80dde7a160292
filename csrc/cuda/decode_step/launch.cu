#include "cuda/decode_step/launch.h"

#include "cuda/decode_step/plan.cuh"
#include "dispatch.h"

namespace hata {

namespace step {
// Launches the step of codes of kNumWords words, or returns false, having done nothing. launch.cuh
// defines it, instances_*.cu make it, side by side.
template <int kNumWords>
bool launch(Params& params, CudaStream stream);
}  // namespace step

namespace {

using step::Params;

constexpr int kMaxGridY = 65535;  // KV heads
// The positions of one block alone: each must have a place in a CandidateList.
constexpr int kMaxCapacity = few_threads(step::KernelKind::kTokens) * step::kMostPlaces;

bool launch_if_possible(Params& params, CudaStream stream) {
  const ScoreSelectParams& p = params.select;
  if (p.q_len > step::kMaxTokens || p.table.capacity > kMaxCapacity) return false;
  if (p.num_kv_heads > kMaxGridY) return false;
  if (p.table.batch == 0 || p.num_kv_heads == 0 || p.q_len == 0) return true;
  bool launched = false;
  dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>("num_words", p.code_cache.num_words, [&](auto num_words) {
    launched = step::launch<num_words>(params, stream);
  });
  return launched;
}

bool launch_step(const DecodeStepParams& p, bool attends, CudaStream stream) {
  if (p.select.num_recent < p.select.q_len) return false;
  if (p.append.cache.head_dim > step::kMaxStepHeadDim) return false;
  Params params{.select = p.select,
                .encodes = true,
                .encode = p.encode,
                .append = p.append,
                .group = p.encode.num_heads / p.encode.num_kv_heads,
                .attends = attends,
                .attend = p.attend};
  return launch_if_possible(params, stream);
}

}  // namespace

bool score_select_cluster(const ScoreSelectParams& p, CudaStream stream) {
  Params params{};
  params.select = p;
  return launch_if_possible(params, stream);
}

bool encode_score_select_cluster(const DecodeStepParams& p, CudaStream stream) {
  return launch_step(p, false, stream);
}

bool decode_step_cluster(const DecodeStepParams& p, CudaStream stream) {
  return step::can_attend(p.attend) && launch_step(p, true, stream);
}

}  // namespace hata
