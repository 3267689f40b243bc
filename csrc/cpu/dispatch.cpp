#include <cstdlib>
#include <string>

#include "kernels.h"

namespace talos {
namespace {

const Kernels& choose() {
#ifdef __x86_64__
  const char* wish = std::getenv("TALOS_CPU_CAPABILITY");
  const std::string limit = wish == nullptr ? "avx512" : wish;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && limit == "avx512") return avx512::kKernels;
  if (has_avx2 && (limit == "avx512" || limit == "avx2")) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace talos
