// What the torch side passes to the CUDA side: plain data, so that neither needs the other's
// headers.
#pragma once

#include "../arguments.h"

namespace talos {

// One tensor's pointers, passed by value as kernel parameters. An upload into a device table would
// need a pinned buffer that outlives the copy, and a captured graph would read it again at every
// replay. A launch takes kMaxTensors of them, 16 KB of the 32 KB that it may carry. A longer list
// takes several launches, in which the programs of other tensors return at once.
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

struct AdamLaunch : AdamArguments {
  AdamScalars* scalars;  // [n_tensors], written before they are read
};

// Each launches on `stream` of the current device, never waits, and returns nullptr or CUDA's
// message.
const char* launch_sparse_adam(const AdamLaunch& launch, const Slots& slots, void* stream);
const char* launch_add_delta(const DeltaArguments& launch, const Slots& slots, void* stream);

}  // namespace talos
