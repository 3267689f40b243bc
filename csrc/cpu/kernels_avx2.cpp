// The kernels for x86-64 with AVX2.
//
// Only what stands between push and pop may use these instructions. The headers come before it: an
// inline function of theirs, compiled with them here, could be the copy that the linker keeps for
// the whole library, and that would crash an older processor.
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#endif

namespace talos::avx2 {
#include "select_scalar.h"

typedef __m256 Lanes;
constexpr int kLanes = 8, kTileRows = 4;
inline Lanes spread(float a) { return _mm256_set1_ps(a); }
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
#include "bodies.h"
}  // namespace talos::avx2

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
