// The selected entries of a program, shared among the threads of its block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../layout.h"
#include "launch.h"

namespace talos {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 4;  // entries of a thread whose loads are in flight together
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// The number 1.
template <class T>
__device__ inline T one() {
  if constexpr (std::is_same_v<T, float>) {
    return 1.0f;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __ushort_as_bfloat16(0x3f80);
  } else {
    return __ushort_as_half(0x3c00);
  }
}

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// Everything but `even`, `odd` and their ranks is the same in all threads of the block.
struct Selection {
  int64_t tensor;
  int64_t tensor_rank;  // of the tensor's first selected entry
  int64_t dense_begin;  // of the block, in entries of the tensor
  int64_t rank;         // of the block's first selected entry
  int dense_count;
  int count;    // selected entries
  int batches;  // a thread's share is `batches` times kUnroll entries, some of them inactive
  const uint16_t* positions;  // or nullptr: the words tell the entries
  // Every warp holds the block's 64 bitmap words, two a lane, and the selected entries before each.
  uint32_t even, odd;
  int even_rank, odd_rank;

  // Finds program `program`. Returns false, for all threads of the block, if it belongs to no slot
  // of this launch, selects nothing, or the index's buffers contradict each other.
  __device__ bool find(const IndexView& index, const Slots& slots, int64_t program);

  // Returns a thread's entries of a batch: which are active, their places and ranks in the block.
  // All lanes of a warp call this together, with kListed == (positions != nullptr).
  template <bool kListed>
  __device__ void entries(int batch, bool (&active)[kUnroll], int (&dense)[kUnroll],
                          int (&local)[kUnroll]) const;

  // Calls body(active, dense, local) with every batch of the thread's entries: the one walk over an
  // index, of all kernels and encodings.
  template <class Body>
  __device__ void for_batches(const Body& body) const;
};

__device__ inline int inclusive_sum(int x) {
  const int lane = threadIdx.x % 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int left = __shfl_up_sync(kAllLanes, x, offset);
    if (lane >= offset) x += left;
  }
  return x;
}

// Independent loads come before the checks of what they load.
__device__ inline bool Selection::find(const IndexView& index, const Slots& slots,
                                       int64_t program) {
  tensor = index.programs[2 * program];
  const int64_t block = index.programs[2 * program + 1];
  if (tensor < slots.first || tensor >= slots.first + slots.count) return false;
  const int64_t* row = index.table + tensor * kColumns;
  const int64_t numel = row[kNumel], encoding = row[kEncoding], data = row[kData];
  const int64_t start = row[kStarts] + block;
  tensor_rank = row[kRank];
  const int64_t size = entries_per_program(encoding);
  dense_begin = block * size;
  if (numel != slots.slot[tensor - slots.first].numel) return false;
  if (encoding < kFull || encoding > kU16 || block < 0 || dense_begin >= numel) return false;
  if (encoding != kFull && (start < 0 || start + 1 >= index.n_starts)) return false;

  const int lane = threadIdx.x % 32;
  even = odd = ~0u;
  if (encoding == kBitmap) {
    const int64_t word = data + block * kWordsPerBlock;
    if (word < 0 || word > index.n_words - kWordsPerBlock) return false;
    even = index.words[word + 2 * lane];
    odd = index.words[word + 2 * lane + 1];
  }
  dense_count = static_cast<int>(numel - dense_begin < size ? numel - dense_begin : size);
  rank = tensor_rank + dense_begin;
  count = dense_count;
  if (encoding != kFull) {
    rank = index.starts[start];
    const int64_t selected = index.starts[start + 1] - rank;
    if (selected < 1 || selected > dense_count) return false;
    count = static_cast<int>(selected);
  }
  if (rank < 0 || rank > index.nnz - count) return false;

  if (encoding == kU16) {
    const int64_t position = data + rank - tensor_rank;
    if (position < 0 || position > index.n_positions - count) return false;
    positions = index.positions + position;
    batches = static_cast<int>(ceil_div(count, kThreads * kUnroll));
    return true;
  }
  positions = nullptr;
  batches = static_cast<int>(kBlockSize / (kThreads * kUnroll));
  const int ones = __popc(even);
  odd_rank = inclusive_sum(ones + __popc(odd)) - __popc(odd);
  even_rank = odd_rank - ones;
  return true;
}

template <bool kListed>
__device__ inline void Selection::entries(int batch, bool (&active)[kUnroll], int (&dense)[kUnroll],
                                          int (&local)[kUnroll]) const {
  if constexpr (kListed) {
    for (int k = 0; k < kUnroll; ++k) {
      local[k] = (batch * kUnroll + k) * kThreads + static_cast<int>(threadIdx.x);
      active[k] = local[k] < count;
      dense[k] = active[k] ? positions[local[k]] : 0;
    }
    for (int k = 0; k < kUnroll; ++k) active[k] = active[k] && dense[k] < dense_count;
    return;
  }
  // A warp's words are neighbours: word w of the block is entries 32 w .. 32 w + 31, one a lane.
  static_assert(kUnroll % 2 == 0, "a lane's two words lie in one batch");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = warp * (static_cast<int>(kWordsPerBlock) / kWarps) + batch * kUnroll;
  for (int k = 0; k < kUnroll; ++k) {
    const uint32_t word = __shfl_sync(kAllLanes, k % 2 == 0 ? even : odd, (first + k) / 2);
    const int before = __shfl_sync(kAllLanes, k % 2 == 0 ? even_rank : odd_rank, (first + k) / 2);
    dense[k] = (first + k) * 32 + lane;
    local[k] = before + __popc(word & ((1u << lane) - 1u));
    active[k] = (word >> lane & 1u) != 0 && dense[k] < dense_count && local[k] < count;
  }
}

template <bool kListed, class Body>
__device__ inline void walk(const Selection& s, const Body& body) {
#pragma unroll 1
  for (int batch = 0; batch < s.batches; ++batch) {
    bool active[kUnroll];
    int dense[kUnroll], local[kUnroll];
    s.entries<kListed>(batch, active, dense, local);
    body(active, dense, local);
  }
}

template <class Body>
__device__ inline void Selection::for_batches(const Body& body) const {
  if (positions != nullptr)
    walk<true>(*this, body);
  else
    walk<false>(*this, body);
}

// An address in global memory that the compiler does not take apart. An entry's address then takes
// one instruction; else the compiler adds its 64-bit terms at every access. From sm_100 on it does
// well by itself.
template <class T>
__device__ inline T* whole(T* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
  asm volatile("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// An unselected entry is 1: with 0 the divisions and the root would take slow paths.
template <class T>
__device__ inline T load(const T* from, bool active) {
  T x = one<T>();
  if (active) x = *from;
  return x;
}

// Starts a kernel of `blocks` thread blocks, which must fit in a grid.
template <class... Parameters, class... Arguments>
const char* start(void (*kernel)(Parameters...), int64_t blocks, void* stream,
                  const Arguments&... arguments) {
  if (blocks > 2147483647) return "index must have at most 2^31 - 1 programs";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, not by the next call
  return cudaGetErrorString(error);
}

}  // namespace talos
