// Where the CUDA kernels run. Guard and stream come from c10's device-neutral interface: no CUDA header or library of
// torch is needed, so that the operators compile, link and import against a CPU build of torch too. torch before 2.11
// does not hand out a stream's handle there; build_extension.py then sets DPPO_STREAM_OF_C10_CUDA and links
// libc10_cuda.
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

#if defined(DPPO_STREAM_OF_C10_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

#include "cuda/launch.h"

namespace megatron_dppo {
inline bool is_on_cuda(const at::Tensor& tensor) { return tensor.is_cuda(); }
// The tensor's device is the current one while this lives.
class CudaDevice {
 public:
  explicit CudaDevice(const at::Tensor& tensor) : device_(tensor.device()), guard_(device_) {}
  cudaStream_t stream() const {
#if defined(DPPO_STREAM_OF_C10_CUDA)
    return c10::cuda::getCurrentCUDAStream(device_.index()).stream();
#else
    const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
    return static_cast<cudaStream_t>(cuda.getStream(device_).native_handle());
#endif
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
