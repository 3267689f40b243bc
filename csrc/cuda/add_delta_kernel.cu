#include "launch.h"
#include "selection.h"

namespace talos {
namespace {

template <class P, class V>
__global__ void __launch_bounds__(kThreads)
    add_delta_kernel(const __grid_constant__ DeltaLaunch a, const __grid_constant__ Slots slots) {
  Selection s;
  if (!s.find(a.index, slots, blockIdx.x)) return;
  const Slot& slot = slots.slot[s.tensor - slots.first];
  if (slot.param == nullptr) return;
  P* params = static_cast<P*>(slot.param) + s.dense_begin;
  const V* values = static_cast<const V*>(a.values) + s.rank;
  P* saved = a.saved == nullptr ? nullptr : static_cast<P*>(a.saved) + s.rank;

  for (int batch = 0; batch < s.batches; ++batch) {
    bool active[kUnroll];
    int dense[kUnroll], local[kUnroll];
    P old[kUnroll];
    float value[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      active[k] = s.entry(batch, k, dense[k], local[k]);
      if (!active[k]) continue;
      old[k] = params[dense[k]];
      value[k] = to_float(values[local[k]]);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (!active[k]) continue;
      if (saved != nullptr) saved[local[k]] = old[k];
      params[dense[k]] = from_float<P>(to_float(old[k]) + a.scale * value[k]);
    }
  }
}

template <class P>
void launch(const DeltaLaunch& a, const Slots& slots, cudaStream_t stream) {
  const auto programs = static_cast<unsigned>(a.index.n_programs);
  if (a.value_dtype == DType::f32)
    add_delta_kernel<P, float><<<programs, kThreads, 0, stream>>>(a, slots);
  else if (a.value_dtype == DType::bf16)
    add_delta_kernel<P, __nv_bfloat16><<<programs, kThreads, 0, stream>>>(a, slots);
  else
    add_delta_kernel<P, __half><<<programs, kThreads, 0, stream>>>(a, slots);
}

}  // namespace

const char* launch_add_delta(const DeltaLaunch& a, const Slots& slots, void* stream) {
  if (a.index.n_programs == 0) return nullptr;
  if (!grid_fits(a.index)) return "index must have at most 2^31 - 1 programs";
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (a.param_dtype == DType::f32)
    launch<float>(a, slots, cuda_stream);
  else if (a.param_dtype == DType::bf16)
    launch<__nv_bfloat16>(a, slots, cuda_stream);
  else
    launch<__half>(a, slots, cuda_stream);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace talos
