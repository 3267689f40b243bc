#include "../adam.h"
#include "launch.h"
#include "selection.h"

namespace talos {
namespace {

// One thread a tensor: counts its step and derives what its entries share, so that the step's
// kernel holds nothing in double.
__global__ void __launch_bounds__(kThreads)
    adam_scalars_kernel(const AdamLaunch __grid_constant__ a, const Slots __grid_constant__ slots) {
  if (a.found_inf != nullptr && *a.found_inf != 0.0f) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= slots.count || slots.slot[i].grad == nullptr) return;
  const int64_t tensor = slots.first + i;
  const float step = a.steps[tensor] + 1.0f;
  a.steps[tensor] = step;
  a.scalars[tensor] = adam_scalars(*a.lr, step, a.beta1, a.beta2, a.weight_decay, a.seed);
}

__device__ inline void store_moment(float* to, float x, uint32_t) { *to = x; }
__device__ inline void store_moment(__nv_bfloat16* to, float x, uint32_t noise) {
  *to = __ushort_as_bfloat16(rounded_stochastically(x, noise));
}

// One thread block a program, four of them a multiprocessor: 64 registers a thread.
template <class P, class G, class M, bool kMaster>
__global__ void __launch_bounds__(kThreads, 4)
    sparse_adam_kernel(const AdamLaunch __grid_constant__ a, const Slots __grid_constant__ slots) {
  const float found_inf = a.found_inf != nullptr ? *a.found_inf : 0.0f;
  Selection s;
  if (!s.find(a.index, slots, blockIdx.x)) return;
  const Slot& slot = slots.slot[s.tensor - slots.first];
  if (slot.grad == nullptr || slot.param == nullptr) return;
  // A compact gradient begins at its tensor's first rank.
  const bool compact = slot.grad_numel != slot.numel;
  const int64_t first = compact ? s.rank - s.tensor_rank : s.dense_begin;
  if (compact && (first < 0 || first > slot.grad_numel - s.count)) return;
  const float clip = a.clip_factor != nullptr ? *a.clip_factor : 1.0f;
  P* params = whole(static_cast<P*>(slot.param) + s.dense_begin);
  const G* grads = whole(static_cast<const G*>(slot.grad) + first);
  M* exp_avgs = whole(static_cast<M*>(a.exp_avg) + s.rank);
  M* exp_avg_sqs = whole(static_cast<M*>(a.exp_avg_sq) + s.rank);
  float* masters = kMaster ? whole(a.master + s.rank) : nullptr;
  const AdamScalars scalars = a.scalars[s.tensor];
  const float scale = a.grad_scale != nullptr ? *a.grad_scale : 1.0f;
  const float factor = a.maximize ? -clip : clip;
  if (found_inf != 0.0f) return;
  // All loads of a batch are issued before its arithmetic.
  s.for_batches([&](bool (&active)[kUnroll], int (&dense)[kUnroll], int (&local)[kUnroll]) {
    P param[kUnroll];
    G grad[kUnroll];
    M exp_avg[kUnroll], exp_avg_sq[kUnroll];
    float master[kUnroll];
    for (int k = 0; k < kUnroll; ++k) param[k] = load(params + dense[k], active[k]);
    for (int k = 0; k < kUnroll; ++k)
      grad[k] = load(grads + (compact ? local[k] : dense[k]), active[k]);
    for (int k = 0; k < kUnroll; ++k) exp_avg[k] = load(exp_avgs + local[k], active[k]);
    for (int k = 0; k < kUnroll; ++k) exp_avg_sq[k] = load(exp_avg_sqs + local[k], active[k]);
    for (int k = 0; k < kUnroll; ++k)
      if constexpr (kMaster) master[k] = load(masters + local[k], active[k]);
    for (int k = 0; k < kUnroll; ++k) {
      float g = to_float(grad[k]);
      if (a.grad_scale != nullptr) g = g / scale;
      float w = to_float(param[k]), m = to_float(exp_avg[k]), v = to_float(exp_avg_sq[k]);
      // A weight that somebody else wrote since the last step wins over its master.
      if (kMaster && to_float(from_float<P>(master[k])) == w) w = master[k];
      adam_entry(g * factor, w, m, v, a.constants, scalars);
      // The stores' addresses are computed again: kept since the loads, they would spill.
      asm volatile("" : "+r"(local[k]), "+r"(dense[k]));
      if (!active[k]) continue;
      const uint32_t noise =
          std::is_same_v<M, float> ? 0 : noise_bits(scalars.noise_key, s.rank + local[k]);
      store_moment(exp_avgs + local[k], m, noise);
      store_moment(exp_avg_sqs + local[k], v, noise >> 16);
      if constexpr (kMaster) masters[local[k]] = w;
      params[dense[k]] = from_float<P>(w);
    }
  });
}

template <class P, class G, class M>
const char* launch(const AdamLaunch& a, const Slots& slots, void* stream) {
  const auto kernel =
      a.master != nullptr ? sparse_adam_kernel<P, G, M, true> : sparse_adam_kernel<P, G, M, false>;
  return start(kernel, a.index.n_programs, stream, a, slots);
}

template <class P, class G>
const char* launch(const AdamLaunch& a, const Slots& slots, void* stream) {
  return a.moment_dtype == DType::f32 ? launch<P, G, float>(a, slots, stream)
                                      : launch<P, G, __nv_bfloat16>(a, slots, stream);
}

template <class P>
const char* launch(const AdamLaunch& a, const Slots& slots, void* stream) {
  return a.grad_dtype == DType::f32 ? launch<P, float>(a, slots, stream)
                                    : launch<P, P>(a, slots, stream);
}

}  // namespace

const char* launch_sparse_adam(const AdamLaunch& a, const Slots& slots, void* stream) {
  const char* error = start(adam_scalars_kernel, ceil_div(slots.count, kThreads), stream, a, slots);
  if (error != nullptr || a.index.n_programs == 0) return error;
  if (a.param_dtype == DType::f32) return launch<float, float>(a, slots, stream);
  if (a.param_dtype == DType::bf16) return launch<__nv_bfloat16>(a, slots, stream);
  return launch<__half>(a, slots, stream);
}

}  // namespace talos
