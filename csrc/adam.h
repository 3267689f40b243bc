// The arithmetic of one AdamW step, shared by every kernel.
//
// Both compilers run with contraction off (-ffp-contract=off, -fmad=false), so an operation is
// fused only where fmaf is written. That is where torch 2.11's AVX2 and AVX-512 kernels fuse: in
// lerp and addcmul, not in addcdiv. So exp_avg and exp_avg_sq have the bits of
// torch.optim.AdamW(foreach=False, fused=False). Weights do, too, except for the square root: this
// one is rounded correctly; torch's on x86 is MKL's, which is 1 ulp off for .6 % of arguments.
#pragma once

#include <cmath>
#include <cstring>

#include "layout.h"

namespace talos {

// Numbers shared by all entries of a step, computed in double and rounded to float once.
struct AdamConstants {
  float lerp;  // exp_avg = base + lerp * (g - exp_avg), base = lerp_from_grad ? g : exp_avg
  bool lerp_from_grad;  // torch's lerp starts from the end when the weight is .5 or more
  float beta2;
  float one_minus_beta2;
  float eps;
};

// Numbers shared by the entries of one tensor.
struct alignas(16) AdamScalars {
  float decay;      // 1 - lr * weight_decay; 1 when there is no decay, and w * 1 is w
  float step_size;  // -lr / (1 - beta1^step)
  float bias_correction2_sqrt;
  uint32_t noise_key;  // of seed and step
};

// Mixes 32 bits by a bijection ("lowbias32").
TALOS_HOST_DEVICE inline uint32_t mix_bits(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

TALOS_HOST_DEVICE inline uint32_t noise_key(int64_t seed, double step) {
  return mix_bits(mix_bits(static_cast<uint32_t>(seed)) + static_cast<uint32_t>(step));
}

// The noise that rounds the two moments of the entry at `rank`, 16 bits each.
TALOS_HOST_DEVICE inline uint32_t noise_bits(uint32_t key, int64_t rank) {
  const auto bits = static_cast<uint64_t>(rank);
  return mix_bits(mix_bits(key + static_cast<uint32_t>(bits >> 32)) ^ static_cast<uint32_t>(bits));
}

// Rounds `x` up or down to bfloat16 so that the mean is `x`: adds 16 bits of noise to its bits and
// cuts them off. Infinities and NaN are kept.
TALOS_HOST_DEVICE inline uint16_t rounded_stochastically(float x, uint32_t noise) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7f800000u) == 0x7f800000u)
    return static_cast<uint16_t>(bits >> 16 | ((bits & 0x7fffffu) != 0 ? 0x40u : 0u));
  return static_cast<uint16_t>((bits + (noise & 0xffffu)) >> 16);
}

inline AdamConstants adam_constants(double beta1, double beta2, double eps) {
  const float weight = static_cast<float>(1.0 - beta1);
  const bool from_grad = !(fabsf(weight) < 0.5f);
  return {from_grad ? weight - 1.0f : weight, from_grad, static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2), static_cast<float>(eps)};
}

TALOS_HOST_DEVICE inline AdamScalars adam_scalars(double lr, double step, double beta1,
                                                  double beta2, double weight_decay, int64_t seed) {
  return {weight_decay == 0.0 ? 1.0f : static_cast<float>(1.0 - lr * weight_decay),
          static_cast<float>(-(lr / (1.0 - pow(beta1, step)))),
          static_cast<float>(sqrt(1.0 - pow(beta2, step))), noise_key(seed, step)};
}

TALOS_HOST_DEVICE inline void adam_entry(float g, float& w, float& exp_avg, float& exp_avg_sq,
                                         const AdamConstants& c, const AdamScalars& s) {
  const float base = c.lerp_from_grad ? g : exp_avg;
  exp_avg = fmaf(c.lerp, g - exp_avg, base);
  exp_avg_sq = fmaf(c.one_minus_beta2 * g, g, exp_avg_sq * c.beta2);
  const float denom = sqrtf(exp_avg_sq) / s.bias_correction2_sqrt + c.eps;
  w = w * s.decay + (s.step_size * exp_avg) / denom;
}

}  // namespace talos
