// What the torch side hands to the CUDA side: plain data, so that neither includes the other's
// headers.
#pragma once

#include "../adam.h"
#include "../layout.h"

namespace talos {

// One tensor's pointers. They travel as kernel parameters, by value: an upload into a device table
// would need a pinned buffer that outlives the copy, and a captured graph would read it again at
// every replay. A launch takes kMaxTensors of them (16 KB of the 32 KB that a launch may carry); a
// longer list takes several launches, in which the programs of the other tensors return at once.
struct Slot {
  void* param;       // nullptr: the tensor is empty
  const void* grad;  // nullptr: the tensor is skipped
  int64_t numel;
  int64_t grad_numel;  // other than numel: the gradient is compact
};

constexpr int64_t kMaxTensors = 512;

struct Slots {
  int64_t first;  // tensor of slot[0]
  int64_t count;
  Slot slot[kMaxTensors];
};

struct AdamLaunch {
  IndexView index;
  DType param_dtype, grad_dtype, moment_dtype;
  void* exp_avg;
  void* exp_avg_sq;
  float* master;         // or nullptr
  float* steps;          // [n_tensors]
  AdamScalars* scalars;  // [n_tensors], written before they are read
  const double* lr;
  const float* grad_scale;   // or nullptr
  const float* found_inf;    // or nullptr
  const float* clip_factor;  // or nullptr
  AdamConstants constants;
  double beta1, beta2, weight_decay;
  bool maximize;
  int64_t seed;
};

struct DeltaLaunch {
  IndexView index;
  DType param_dtype, value_dtype;
  const void* values;
  void* saved;  // or nullptr
  float scale;
};

// Each launches on `stream` of the current device, never waits, and returns nullptr or CUDA's
// message.
const char* launch_sparse_adam(const AdamLaunch& launch, const Slots& slots, void* stream);
const char* launch_add_delta(const DeltaLaunch& launch, const Slots& slots, void* stream);

}  // namespace talos
