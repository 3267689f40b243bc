// As much of CUDA as the kernels in csrc/cuda use, so that a C++ compiler builds them for the CPU.
//
// A launch runs one thread block after another and in it one warp after another. The 32 lanes of a
// warp are coroutines: each runs until it exchanges a value with the others, or returns. Lanes that
// do not all come to the same exchanges end the program with a message. Where the environment has
// CUDA_ON_CPU_BACKWARDS, blocks, warps and lanes run in the opposite order.
#pragma once

#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __device__
#define __global__
#define __grid_constant__ &  // a kernel's parameters are its caller's: no copies for each thread
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1;
  dim3(unsigned n = 1) : x(n) {}
};
inline dim3 threadIdx, blockIdx;

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t x) {
  return __nv_bfloat16(x, c10::BFloat16::from_bits());
}
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __ushort_as_half(uint16_t x) { return __half(x, c10::Half::from_bits()); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

namespace cuda_on_cpu {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 * 1024;

enum class State { kNew, kStarted, kReturned };

struct Lane {
  State state;
  ucontext_t beginning;
  jmp_buf place;
  int exchanges;
  uint64_t given[2];  // in turns: a lane may come to an exchange before others left the last
  alignas(16) char stack[kStack];
};

inline Lane lanes[kLanes];
inline int lane, running;
inline bool backwards;
inline unsigned first_thread;
inline jmp_buf launcher;
inline std::function<void()> body;

inline void run();

[[noreturn]] inline void disagree() {
  std::fputs("the lanes of a warp did not come to the same exchanges\n", stderr);
  std::abort();
}

// Goes on with the next lane; never returns.
[[noreturn]] inline void pass_on(int next) {
  lane = next;
  threadIdx.x = first_thread + next;
  Lane& to = lanes[next];
  if (to.state == State::kStarted) _longjmp(to.place, 1);
  if (to.state == State::kReturned) disagree();
  to.state = State::kStarted;
  getcontext(&to.beginning);
  to.beginning.uc_stack.ss_sp = to.stack;
  to.beginning.uc_stack.ss_size = kStack;
  makecontext(&to.beginning, run, 0);
  setcontext(&to.beginning);
  std::abort();
}

inline int following(int i) { return (i + (backwards ? kLanes - 1 : 1)) % kLanes; }

inline void run() {
  body();
  lanes[lane].state = State::kReturned;
  if (lanes[lane].exchanges != lanes[0].exchanges) disagree();
  if (--running == 0) _longjmp(launcher, 1);
  pass_on(following(lane));
}

template <class T>
T exchange(T value, int source) {
  Lane& self = lanes[lane];
  const int turn = self.exchanges++ % 2;
  std::memcpy(&self.given[turn], &value, sizeof(T));
  if (_setjmp(self.place) == 0) pass_on(following(lane));
  std::memcpy(&value, &lanes[source].given[turn], sizeof(T));
  return value;
}

inline void run_warp() {
  for (Lane& each : lanes) {
    each.state = State::kNew;
    each.exchanges = 0;
  }
  running = kLanes;
  if (_setjmp(launcher) == 0) pass_on(backwards ? kLanes - 1 : 0);
}

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned, T x, int source) {
  return cuda_on_cpu::exchange(x, source);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int offset) {
  const int lane = cuda_on_cpu::lane;
  return cuda_on_cpu::exchange(x, lane < offset ? lane : lane - offset);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using namespace cuda_on_cpu;
  const unsigned blocks = config->gridDim.x, warps = config->blockDim.x / kLanes;
  backwards = std::getenv("CUDA_ON_CPU_BACKWARDS") != nullptr;
  body = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = backwards ? blocks - 1 - i : i;
    for (unsigned j = 0; j < warps; ++j) {
      first_thread = (backwards ? warps - 1 - j : j) * kLanes;
      run_warp();
    }
  }
  return cudaSuccess;
}
