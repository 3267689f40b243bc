// The ops on CUDA devices: checks, then one launch on torch's current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>

#include "../checks.h"
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

void sparse_adam_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& index, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                  const std::optional<Tensor>& master, const Tensor& steps, const Tensor& lr,
                  double beta1, double beta2, double eps, double weight_decay, bool maximize,
                  const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                  const std::optional<Tensor>& clip_factor, int64_t seed) {
  constexpr ScalarType kFloat = ScalarType::Float;
  const auto n = static_cast<int64_t>(params.size());
  const int64_t nnz = exp_avg.numel();
  const TensorList p = checked_params(params, exp_avg);
  const TensorList g = checked_grads(grads, p, exp_avg);
  AdamLaunch call{};
  call.index = checked_index(index, n, nnz, exp_avg);
  call.param_dtype = p.dtype;
  call.grad_dtype = g.dtype;
  call.moment_dtype = checked_moment_dtype(exp_avg);
  const ScalarType moments = scalar_type_of(call.moment_dtype);
  call.exp_avg = checked_array(exp_avg, "exp_avg", moments, nnz, exp_avg);
  call.exp_avg_sq = checked_array(exp_avg_sq, "exp_avg_sq", moments, nnz, exp_avg);
  call.master = checked_array<float>(master, "master", kFloat, nnz, exp_avg);
  call.steps = static_cast<float*>(checked_array(steps, "steps", kFloat, n, exp_avg));
  call.lr = static_cast<const double*>(checked_array(lr, "lr", ScalarType::Double, 1, exp_avg));
  call.grad_scale = checked_array<const float>(grad_scale, "grad_scale", kFloat, 1, exp_avg);
  call.found_inf = checked_array<const float>(found_inf, "found_inf", kFloat, 1, exp_avg);
  call.clip_factor = checked_array<const float>(clip_factor, "clip_factor", kFloat, 1, exp_avg);
  constexpr int64_t kFloats = sizeof(AdamScalars) / sizeof(float);
  const Tensor scalars = torch::stable::new_empty(exp_avg, {n * kFloats}, kFloat);
  call.scalars = static_cast<AdamScalars*>(scalars.data_ptr());
  call.constants = adam_constants(beta1, beta2, eps);
  call.beta1 = beta1;
  call.beta2 = beta2;
  call.weight_decay = weight_decay;
  call.maximize = maximize;
  call.seed = seed;
  launch_all(p, &g, exp_avg, [&](const Slots& slots, void* stream) {
    return launch_sparse_adam(call, slots, stream);
  });
}

void add_delta_(const std::vector<Tensor>& params, const std::vector<Tensor>& index,
                const Tensor& values, double scale, const std::optional<Tensor>& saved) {
  const TensorList p = checked_params(params, values);
  DeltaLaunch call{};
  call.index = checked_index(index, static_cast<int64_t>(params.size()), values.numel(), values);
  call.param_dtype = p.dtype;
  call.value_dtype = checked_float_dtype(values, "values");
  call.values = checked_array(values, "values", values.scalar_type(), values.numel(), values);
  call.scale = static_cast<float>(scale);
  call.saved = checked_array<void>(saved, "saved", scalar_type_of(p.dtype), values.numel(), values);
  launch_all(p, nullptr, values, [&](const Slots& slots, void* stream) {
    return launch_add_delta(call, slots, stream);
  });
}

}  // namespace
}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_C, CUDA, m) {
  m.impl("sparse_adam_", TORCH_BOX(&talos::sparse_adam_));
  m.impl("add_delta_", TORCH_BOX(&talos::add_delta_));
}
