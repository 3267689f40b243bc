// The ops on CUDA devices: checks, then one launch on torch's current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>

#include "../ops.h"
#include "launch.h"

// Weak, because a torch without CUDA lacks it; nothing there calls an op with CUDA tensors.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace talos {
namespace {

// Calls launch(slots, stream) for at most kMaxTensors params at a time, on their device.
template <class Launch>
void launch_all(const TensorList& params, const TensorList* grads, const Tensor& anchor,
                const Launch& launch) {
  const int32_t device = anchor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto n = static_cast<int64_t>(params.data.size());
  const auto slots = std::make_unique<Slots>();
  for (int64_t first = 0; first < n; first += kMaxTensors) {
    slots->first = first;
    slots->count = std::min(n - first, kMaxTensors);
    for (int64_t i = 0; i < slots->count; ++i) {
      const void* grad = grads == nullptr ? nullptr : grads->data[first + i];
      const int64_t grad_numel = grads == nullptr ? 0 : grads->numel[first + i];
      slots->slot[i] = {params.data[first + i], grad, params.numel[first + i], grad_numel};
    }
    const char* error = launch(*slots, stream);
    STD_TORCH_CHECK(error == nullptr, "the launch of a talos kernel failed: ", error);
  }
}

struct Cuda {
  static void sparse_adam(const AdamArguments& a, const TensorList& params, const TensorList& grads,
                          const Tensor& exp_avg) {
    constexpr int64_t kFloats = sizeof(AdamScalars) / sizeof(float);
    const Tensor scalars =
        torch::stable::new_empty(exp_avg, {a.index.n_tensors * kFloats}, ScalarType::Float);
    const AdamLaunch call{a, static_cast<AdamScalars*>(scalars.data_ptr())};
    launch_all(params, &grads, exp_avg, [&](const Slots& slots, void* stream) {
      return launch_sparse_adam(call, slots, stream);
    });
  }

  static void add_delta(const DeltaArguments& a, const TensorList& params, const Tensor& values) {
    launch_all(params, nullptr, values, [&](const Slots& slots, void* stream) {
      return launch_add_delta(a, slots, stream);
    });
  }
};

}  // namespace
}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_C, CUDA, m) {
  m.impl("sparse_adam_", TORCH_BOX(&talos::sparse_adam_<talos::Cuda>));
  m.impl("add_delta_", TORCH_BOX(&talos::add_delta_<talos::Cuda>));
}
