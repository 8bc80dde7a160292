#include "cuda/decode_step/launch.cuh"

namespace hata::step {

template bool launch<1>(Params&, CudaStream);
template bool launch<2>(Params&, CudaStream);

}  // namespace hata::step
