#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "hash_code.h"

// torch declares this only in its CUDA builds. Weak, so that _C still loads in a CPU build of
// torch, where no CUDA tensor can reach the code that calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace hata {

// Runs an op where its tensors are: on CUDA with the device of `t` current, on torch's current
// stream of that device.
template <typename Params>
void launch(const torch::stable::Tensor& t, const Params& params, void (*on_cpu)(const Params&),
            void (*on_cuda)(const Params&, CudaStream)) {
  if (!t.is_cuda()) return on_cpu(params);
  const int32_t device = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  on_cuda(params, static_cast<CudaStream>(stream));
}

}  // namespace hata
