#include "launch.h"
#include "selection.h"

namespace talos {
namespace {

template <class P, class V>
__global__ void __launch_bounds__(kThreads, 4)
    add_delta_kernel(const DeltaArguments __grid_constant__ a,
                     const Slots __grid_constant__ slots) {
  Selection s;
  if (!s.find(a.index, slots, blockIdx.x)) return;
  const Slot& slot = slots.slot[s.tensor - slots.first];
  if (slot.param == nullptr) return;
  P* params = whole(static_cast<P*>(slot.param) + s.dense_begin);
  const V* values = whole(static_cast<const V*>(a.values) + s.rank);
  P* saved = a.saved == nullptr ? nullptr : whole(static_cast<P*>(a.saved) + s.rank);
  s.for_batches([&](bool (&active)[kUnroll], int (&dense)[kUnroll], int (&local)[kUnroll]) {
    P param[kUnroll];
    V value[kUnroll];
    for (int k = 0; k < kUnroll; ++k) param[k] = load(params + dense[k], active[k]);
    for (int k = 0; k < kUnroll; ++k) value[k] = load(values + local[k], active[k]);
    for (int k = 0; k < kUnroll; ++k) {
      if (!active[k]) continue;
      if (saved != nullptr) saved[local[k]] = param[k];
      params[dense[k]] = from_float<P>(to_float(param[k]) + a.scale * to_float(value[k]));
    }
  });
}

template <class P>
const char* launch(const DeltaArguments& a, const Slots& slots, void* stream) {
  const auto kernel = a.value_dtype == DType::f32    ? add_delta_kernel<P, float>
                      : a.value_dtype == DType::bf16 ? add_delta_kernel<P, __nv_bfloat16>
                                                     : add_delta_kernel<P, __half>;
  return start(kernel, a.index.n_programs, stream, a, slots);
}

}  // namespace

const char* launch_add_delta(const DeltaArguments& a, const Slots& slots, void* stream) {
  if (a.index.n_programs == 0) return nullptr;
  if (a.param_dtype == DType::f32) return launch<float>(a, slots, stream);
  if (a.param_dtype == DType::bf16) return launch<__nv_bfloat16>(a, slots, stream);
  return launch<__half>(a, slots, stream);
}

}  // namespace talos
