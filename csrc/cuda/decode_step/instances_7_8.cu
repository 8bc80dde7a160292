#include "cuda/decode_step/launch.cuh"

namespace hata::step {

template bool launch<7>(Params&, CudaStream);
template bool launch<8>(Params&, CudaStream);

}  // namespace hata::step
