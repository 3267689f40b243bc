// The selected entries of a program, dealt out to the threads of its block.
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

// Everything but `lo`, `hi`, `lo_rank` and `hi_rank` is the same in all threads of the block.
struct Selection {
  int64_t tensor;
  int64_t encoding;
  int64_t dense_begin;  // of the block, in entries of the tensor
  int64_t rank;         // of the block's first selected entry
  int dense_count;
  int count;    // selected entries
  int batches;  // a thread's share is `batches` times kUnroll entries, some of them inactive
  const uint16_t* positions;
  // Every warp holds the block's 64 bitmap words, two a lane, and the selected entries before each.
  uint32_t lo, hi;
  int lo_rank, hi_rank;

  // Finds program `program`. False where it belongs to no slot of this launch or the index's
  // buffers contradict each other; then for all threads of the block.
  __device__ bool find(const IndexView& index, const Slots& slots, int64_t program);

  // A thread's entry k of a batch: its place in the block and its rank there, as far as it is
  // selected. To be called by all lanes of a warp together.
  __device__ bool entry(int batch, int k, int& dense, int& local) const;
};

__device__ inline int inclusive_sum(int x) {
  const int lane = threadIdx.x % 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int left = __shfl_up_sync(kAllLanes, x, offset);
    if (lane >= offset) x += left;
  }
  return x;
}

__device__ inline bool Selection::find(const IndexView& index, const Slots& slots,
                                       int64_t program) {
  tensor = index.programs[2 * program];
  if (tensor < slots.first || tensor >= slots.first + slots.count) return false;
  const int64_t* row = index.table + tensor * kColumns;
  const int64_t numel = row[kNumel];
  encoding = row[kEncoding];
  const int64_t size = entries_per_program(encoding);
  const int64_t block = index.programs[2 * program + 1];
  if (numel != slots.slot[tensor - slots.first].numel) return false;
  if (encoding < kFull || encoding > kU16 || block < 0 || block >= ceil_div(numel, size))
    return false;

  dense_begin = block * size;
  dense_count = static_cast<int>(numel - dense_begin < size ? numel - dense_begin : size);
  if (encoding == kFull) {
    rank = row[kRank] + dense_begin;
    count = dense_count;
  } else {
    const int64_t start = row[kStarts] + block;
    if (start < 0 || start + 1 >= index.n_starts) return false;
    rank = index.starts[start];
    const int64_t selected = index.starts[start + 1] - rank;
    if (selected < 0 || selected > dense_count) return false;
    count = static_cast<int>(selected);
  }
  if (rank < 0 || rank > index.nnz - count) return false;

  if (encoding == kU16) {
    const int64_t position = row[kData] + rank - row[kRank];
    if (position < 0 || position > index.n_positions - count) return false;
    positions = index.positions + position;
    batches = static_cast<int>(ceil_div(count, kThreads * kUnroll));
    return true;
  }
  batches = static_cast<int>(kBlockSize / (kThreads * kUnroll));
  if (encoding == kBitmap) {
    const int64_t word = row[kData] + block * kWordsPerBlock;
    if (word < 0 || word > index.n_words - kWordsPerBlock) return false;
    const int lane = threadIdx.x % 32;
    lo = index.words[word + lane];
    hi = index.words[word + 32 + lane];
    const int lo_end = inclusive_sum(__popc(lo));
    lo_rank = lo_end - __popc(lo);
    hi_rank = inclusive_sum(__popc(hi)) - __popc(hi) + __shfl_sync(kAllLanes, lo_end, 31);
  }
  return true;
}

__device__ inline bool Selection::entry(int batch, int k, int& dense, int& local) const {
  if (encoding == kU16) {
    local = (batch * kUnroll + k) * kThreads + static_cast<int>(threadIdx.x);
    if (local >= count) return false;
    dense = positions[local];
    return dense < dense_count;
  }
  // A warp's words are neighbours: word w of the block is entries 32 w .. 32 w + 31, one a lane.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int w = (warp * (static_cast<int>(kWordsPerBlock) / kWarps)) + batch * kUnroll + k;
  dense = w * 32 + lane;
  if (encoding == kFull) {
    local = dense;
    return dense < dense_count;
  }
  const uint32_t word = __shfl_sync(kAllLanes, w < 32 ? lo : hi, w % 32);
  local = __shfl_sync(kAllLanes, w < 32 ? lo_rank : hi_rank, w % 32) +
          __popc(word & ((1u << lane) - 1u));
  return (word >> lane & 1u) != 0 && dense < dense_count && local < count;
}

// Blocks of one launch; a grid holds 2^31 - 1 programs, which is more entries than memory does.
inline bool grid_fits(const IndexView& index) { return index.n_programs <= 2147483647; }

}  // namespace talos
