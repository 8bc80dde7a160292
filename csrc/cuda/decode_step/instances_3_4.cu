#include "cuda/decode_step/launch.cuh"

namespace hata::step {

template bool launch<3>(Params&, CudaStream);
template bool launch<4>(Params&, CudaStream);

}  // namespace hata::step
