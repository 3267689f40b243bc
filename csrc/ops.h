// The ops that CPU and CUDA share. Each checks its arguments, before anything is written, and hands
// them to `Device`, which runs it.
#pragma once

#include "arguments.h"
#include "checks.h"

namespace talos {

template <class Device>
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
  AdamArguments a{};
  a.index = checked_index(index, n, nnz, exp_avg);
  a.param_dtype = p.dtype;
  a.grad_dtype = g.dtype;
  a.moment_dtype = checked_moment_dtype(exp_avg);
  const ScalarType moments = scalar_type_of(a.moment_dtype);
  a.exp_avg = checked_array(exp_avg, "exp_avg", moments, nnz, exp_avg);
  a.exp_avg_sq = checked_array(exp_avg_sq, "exp_avg_sq", moments, nnz, exp_avg);
  a.master = checked_array<float>(master, "master", kFloat, nnz, exp_avg);
  a.steps = static_cast<float*>(checked_array(steps, "steps", kFloat, n, exp_avg));
  a.lr = static_cast<const double*>(checked_array(lr, "lr", ScalarType::Double, 1, exp_avg));
  a.grad_scale = checked_array<const float>(grad_scale, "grad_scale", kFloat, 1, exp_avg);
  a.found_inf = checked_array<const float>(found_inf, "found_inf", kFloat, 1, exp_avg);
  a.clip_factor = checked_array<const float>(clip_factor, "clip_factor", kFloat, 1, exp_avg);
  a.constants = adam_constants(beta1, beta2, eps);
  a.beta1 = beta1;
  a.beta2 = beta2;
  a.weight_decay = weight_decay;
  a.maximize = maximize;
  a.seed = seed;
  Device::sparse_adam(a, p, g, exp_avg);
}

inline DeltaArguments checked_delta(const TensorList& params, const std::vector<Tensor>& index,
                                    const Tensor& values) {
  DeltaArguments a{};
  const auto n = static_cast<int64_t>(params.data.size());
  a.index = checked_index(index, n, values.numel(), values);
  a.param_dtype = params.dtype;
  a.value_dtype = checked_float_dtype(values, "values");
  a.values = checked_array(values, "values", values.scalar_type(), values.numel(), values);
  return a;
}

template <class Device>
void add_delta_(const std::vector<Tensor>& params, const std::vector<Tensor>& index,
                const Tensor& values, double scale, const std::optional<Tensor>& saved) {
  const TensorList p = checked_params(params, values);
  DeltaArguments a = checked_delta(p, index, values);
  a.scale = static_cast<float>(scale);
  a.saved = checked_array<void>(saved, "saved", scalar_type_of(p.dtype), values.numel(), values);
  Device::add_delta(a, p, values);
}

}  // namespace talos
