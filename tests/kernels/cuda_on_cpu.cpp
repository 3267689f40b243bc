// The compiled library's CUDA ops, checks and all, as ops of the CPU:
// talos_cuda_on_cpu::sparse_adam_ and so on. See cuda_on_cpu.h.
#include "cuda_on_cpu.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::on_cpu {
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
}  // namespace torch::stable::on_cpu

// A device takes a subroutine for the root of what is not an ordinary number.
extern "C" {
long slow_roots = 0;
}
inline float counted_sqrt(float x) {
  slow_roots += !(x > 1e-30f && x < 1e30f);
  return std::sqrt(x);
}

#define accelerator on_cpu
#define aoti_torch_get_current_cuda_stream current_stream
#define CUDA CPU
#define sqrtf counted_sqrt
#define talos_C talos_cuda_on_cpu

#include "../../csrc/checks.cpp"
#include "../../csrc/cuda/add_delta_kernel.cu"
#include "../../csrc/cuda/cuda_ops.cpp"
#include "../../csrc/cuda/sparse_adam_kernel.cu"
#include "../../csrc/library.cpp"

AOTITorchError current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
