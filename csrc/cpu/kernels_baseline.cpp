// The kernels for any processor: x86-64 without extensions, aarch64.
#include "kernels.h"

namespace talos::baseline {
#include "select_scalar.h"

typedef float Lanes __attribute__((vector_size(16)));
constexpr int kLanes = 4, kTileRows = 4;
inline Lanes spread(float a) { return Lanes{a, a, a, a}; }
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return a * b + c; }
#include "bodies.h"
}  // namespace talos::baseline
