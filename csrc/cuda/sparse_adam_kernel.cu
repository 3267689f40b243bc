#include "../adam.h"
#include "launch.h"
#include "selection.h"

namespace talos {
namespace {

// One thread block a program. First the loads of a batch, then the arithmetic: the powers of the
// bias corrections, in double by two threads, hide behind the first batch's loads.
__device__ inline void store_moment(float* to, float x, uint32_t) { *to = x; }
__device__ inline void store_moment(__nv_bfloat16* to, float x, uint32_t noise) {
  *to = __ushort_as_bfloat16(rounded_stochastically(x, noise));
}

template <class P, class G, class M>
__global__ void __launch_bounds__(kThreads)
    sparse_adam_kernel(const __grid_constant__ AdamLaunch a, const __grid_constant__ Slots slots) {
  __shared__ AdamScalars shared;
  if (a.found_inf != nullptr && *a.found_inf != 0.0f) return;
  Selection s;
  if (!s.find(a.index, slots, blockIdx.x)) return;
  const Slot& slot = slots.slot[s.tensor - slots.first];
  if (slot.grad == nullptr || slot.param == nullptr) return;

  if (threadIdx.x == 0) set_first_moment(shared, *a.lr, a.steps[s.tensor], a.beta1, a.weight_decay);
  if (threadIdx.x == 32) {
    set_second_moment(shared, a.steps[s.tensor], a.beta2, a.eps);
    shared.noise_key = noise_key(a.seed, a.steps[s.tensor]);
  }
  const float scale = a.grad_scale != nullptr ? *a.grad_scale : 1.0f;
  M* exp_avgs = static_cast<M*>(a.exp_avg);
  M* exp_avg_sqs = static_cast<M*>(a.exp_avg_sq);
  P* params = static_cast<P*>(slot.param) + s.dense_begin;
  const float clip = a.clip_factor != nullptr ? *a.clip_factor : 1.0f;
  const float factor = a.maximize ? -clip : clip;
  // A compact gradient begins at its tensor's first rank.
  const bool compact = slot.grad_numel != slot.numel;
  const int64_t first = compact ? s.rank - a.index.table[s.tensor * kColumns + kRank] : 0;
  if (compact && (first < 0 || first > slot.grad_numel - s.count)) return;
  const G* grads = static_cast<const G*>(slot.grad) + (compact ? first : s.dense_begin);

  for (int batch = 0; batch < s.batches; ++batch) {
    bool active[kUnroll];
    int dense[kUnroll], local[kUnroll];
    float g[kUnroll], w[kUnroll], master[kUnroll], exp_avg[kUnroll], exp_avg_sq[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      active[k] = s.entry(batch, k, dense[k], local[k]);
      if (!active[k]) continue;
      const int64_t rank = s.rank + local[k];
      g[k] = to_float(grads[compact ? local[k] : dense[k]]);
      w[k] = to_float(params[dense[k]]);
      exp_avg[k] = to_float(exp_avgs[rank]);
      exp_avg_sq[k] = to_float(exp_avg_sqs[rank]);
      master[k] = a.master != nullptr ? a.master[rank] : w[k];
    }
    if (batch == 0) __syncthreads();  // `batches` is the block's: all threads come by
    const AdamScalars scalars = shared;
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (!active[k]) continue;
      const int64_t rank = s.rank + local[k];
      g[k] = g[k] / scale * factor;
      // A weight somebody else wrote since the last step wins over its master.
      if (to_float(from_float<P>(master[k])) == w[k]) w[k] = master[k];
      adam_entry(g[k], w[k], exp_avg[k], exp_avg_sq[k], scalars);
      const uint32_t noise = std::is_same_v<M, float> ? 0 : noise_bits(scalars.noise_key, rank);
      store_moment(exp_avgs + rank, exp_avg[k], noise);
      store_moment(exp_avg_sqs + rank, exp_avg_sq[k], noise >> 16);
      if (a.master != nullptr) a.master[rank] = w[k];
      params[dense[k]] = from_float<P>(w[k]);
    }
  }
}

template <class P, class G>
void launch(const AdamLaunch& a, const Slots& slots, cudaStream_t stream) {
  const auto programs = static_cast<unsigned>(a.index.n_programs);
  if (a.moment_dtype == DType::f32)
    sparse_adam_kernel<P, G, float><<<programs, kThreads, 0, stream>>>(a, slots);
  else
    sparse_adam_kernel<P, G, __nv_bfloat16><<<programs, kThreads, 0, stream>>>(a, slots);
}

template <class P>
void launch(const AdamLaunch& a, const Slots& slots, cudaStream_t stream) {
  if (a.grad_dtype == DType::f32)
    launch<P, float>(a, slots, stream);
  else
    launch<P, P>(a, slots, stream);
}

}  // namespace

const char* launch_sparse_adam(const AdamLaunch& a, const Slots& slots, void* stream) {
  if (a.index.n_programs == 0) return nullptr;
  if (!grid_fits(a.index)) return "index must have at most 2^31 - 1 programs";
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (a.param_dtype == DType::f32)
    launch<float, float>(a, slots, cuda_stream);
  else if (a.param_dtype == DType::bf16)
    launch<__nv_bfloat16>(a, slots, cuda_stream);
  else
    launch<__half>(a, slots, cuda_stream);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace talos
