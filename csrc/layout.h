// What C++ and CUDA must know of the compressed index; talos_kernels/index.py is its definition.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TALOS_HOST_DEVICE __host__ __device__
#else
#define TALOS_HOST_DEVICE
#endif

namespace talos {

constexpr int64_t kBlockSize = 2048;     // dense entries of a program: full, bitmap
constexpr int64_t kSegmentSize = 65536;  // dense entries of a program: u16
constexpr int64_t kWordsPerBlock = kBlockSize / 32;

enum Encoding : int64_t { kFull = 0, kBitmap = 1, kU16 = 2 };

// Columns of the int64 table [n_tensors, 5].
enum Column : int64_t { kNumel, kEncoding, kRank, kData, kStarts, kColumns };

enum class DType : uint8_t { f32, bf16, f16 };

// The five buffers of an index, borrowed. Their device is the op's.
struct IndexView {
  const uint32_t* words;
  const uint16_t* positions;
  const int64_t* starts;
  const int64_t* table;
  const int32_t* programs;  // [n_programs, 2]: a tensor and a block in it
  int64_t n_words, n_positions, n_starts, n_tensors, n_programs;
  int64_t nnz;  // length of every per-entry array of the call
};

TALOS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tensor's selected entries end where the next one's begin. Reads the table: on its device only.
TALOS_HOST_DEVICE inline int64_t end_of_ranks(const IndexView& index, int64_t tensor) {
  return tensor + 1 < index.n_tensors ? index.table[(tensor + 1) * kColumns + kRank] : index.nnz;
}

TALOS_HOST_DEVICE constexpr int64_t entries_per_program(int64_t encoding) {
  return encoding == kU16 ? kSegmentSize : kBlockSize;
}

}  // namespace talos
