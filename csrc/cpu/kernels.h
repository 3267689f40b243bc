// The CPU kernels, one table of them per instruction set.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../adam.h"
#include "../layout.h"

namespace talos {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

struct AdamCall {
  IndexView index;
  void* const* params;
  void* const* grads;  // nullptr: the tensor is skipped
  DType param_dtype, grad_dtype;
  float* exp_avg;
  float* exp_avg_sq;
  float* master;               // or nullptr
  const AdamScalars* scalars;  // [n_tensors]
  const float* grad_scale;     // or nullptr
  bool maximize;
};

struct GatherCall {
  IndexView index;
  void* const* grads;  // nullptr: the tensor contributes nothing
  DType grad_dtype;
  float* out;
  bool accumulate;
  double* sums;  // [n_programs], sum of squares of each program's part of out
};

// scatter_ and add_delta_: `saved` and `scale` are add_delta_'s.
struct DeltaCall {
  IndexView index;
  void* const* params;
  const void* values;
  DType param_dtype, value_dtype;
  float scale;
  void* saved;  // or nullptr
};

// Each runs the programs begin..end and returns false where the index contradicts itself; what such
// a program would touch is left alone.
struct Kernels {
  bool (*sparse_adam)(const AdamCall&, int64_t begin, int64_t end);
  bool (*gather_grad)(const GatherCall&, int64_t begin, int64_t end);
  bool (*scatter)(const DeltaCall&, int64_t begin, int64_t end);
  bool (*add_delta)(const DeltaCall&, int64_t begin, int64_t end);
};

// The best table for this processor. TALOS_CPU_CAPABILITY=baseline|avx2|avx512 lowers it.
const Kernels& kernels();

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace talos
