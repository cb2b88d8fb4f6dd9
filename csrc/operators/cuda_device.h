// Where the CUDA kernels run. No CUDA header of torch is used, so that the operators compile, link and import against a
// CPU build of torch too: guard and stream come from c10's device-neutral interface.
//
// DPPO_HOST_EMULATION (tests/csrc/emulation): the operators take tensors on the CPU for such on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(DPPO_HOST_EMULATION)

#include "cuda/launch.h"

namespace megatron_dppo {
inline bool is_on_cuda(const at::Tensor&) { return true; }
struct CudaDevice {
  explicit CudaDevice(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};
}  // namespace megatron_dppo

#elif defined(DPPO_WITH_CUDA)

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/launch.h"

namespace megatron_dppo {
inline bool is_on_cuda(const at::Tensor& tensor) { return tensor.is_cuda(); }
// The tensor's device is the current one while this lives.
class CudaDevice {
 public:
  explicit CudaDevice(const at::Tensor& tensor) : device_(tensor.device()), guard_(device_) {}
  cudaStream_t stream() const {
    const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
    return static_cast<cudaStream_t>(cuda.getStream(device_).native_handle());
  }

 private:
  c10::Device device_;
  c10::DeviceGuard guard_;
};
}  // namespace megatron_dppo

#endif

#if defined(DPPO_WITH_CUDA)
namespace megatron_dppo {
inline void check_launch(const char* kernel, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "megatron_dppo: ", kernel, ": ", cudaGetErrorString(error));
}
}  // namespace megatron_dppo
#endif
