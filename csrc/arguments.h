// What an op was called with, after its checks: plain data, so that CUDA sources need no torch
// headers. Pointers lie on the op's device; the tensor lists travel beside it.
#pragma once

#include "adam.h"
#include "layout.h"

namespace talos {

struct AdamArguments {
  IndexView index;
  DType param_dtype, grad_dtype, moment_dtype;
  void* exp_avg;
  void* exp_avg_sq;
  float* master;  // or nullptr
  float* steps;   // [n_tensors]
  const double* lr;
  const float* grad_scale;   // or nullptr
  const float* found_inf;    // or nullptr
  const float* clip_factor;  // or nullptr
  AdamConstants constants;
  double beta1, beta2, weight_decay;
  bool maximize;
  int64_t seed;
};

// scatter_ and add_delta_: `saved` and `scale` are add_delta_'s.
struct DeltaArguments {
  IndexView index;
  DType param_dtype, value_dtype;
  const void* values;
  void* saved;  // or nullptr
  float scale;
};

}  // namespace talos
