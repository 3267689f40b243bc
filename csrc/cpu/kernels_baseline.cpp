// The kernels for any processor: x86-64 without extensions, aarch64.
#include "kernels.h"

namespace talos::baseline {
#include "block.h"

#include "select_scalar.h"

#include "programs.h"

const Kernels kKernels = {sparse_adam, gather_grad, scatter, add_delta};
}  // namespace talos::baseline
