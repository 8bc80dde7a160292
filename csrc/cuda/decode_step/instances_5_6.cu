#include "cuda/decode_step/launch.cuh"

namespace hata::step {

template bool launch<5>(Params&, CudaStream);
template bool launch<6>(Params&, CudaStream);

}  // namespace hata::step
