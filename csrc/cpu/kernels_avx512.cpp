// The kernels for x86-64 with AVX-512.
//
// Only what stands between push and pop may use these instructions. The headers come before it: an
// inline function of theirs, compiled with them here, could be the copy that the linker keeps for
// the whole library, and that would crash an older processor.
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(                                                               \
    __attribute__((                                                                         \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#endif

namespace talos::avx512 {
#include "select_avx512.h"

typedef __m512 Lanes;
constexpr int kLanes = 16, kTileRows = 8;
inline Lanes spread(float a) { return _mm512_set1_ps(a); }
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
#include "bodies.h"
}  // namespace talos::avx512

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
