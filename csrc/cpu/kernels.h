// The CPU kernels, one table of them per instruction set.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../arguments.h"

namespace talos {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

struct AdamCall : AdamArguments {
  void* const* params;
  void* const* grads;           // nullptr: the tensor is skipped
  const int64_t* compact_rank;  // [n_tensors], of grads[i][0] where that is compact, else -1
  const AdamScalars* scalars;   // [n_tensors]
};

struct GatherCall {
  IndexView index;
  void* const* grads;  // nullptr: the tensor contributes nothing
  DType grad_dtype;
  float* out;
  bool accumulate;
};

struct DeltaCall : DeltaArguments {
  void* const* params;
};

// The rows of one side of fisher_diag_: [outer, samples, inner, features], strides in elements.
struct Rows {
  const void* data;
  int64_t outer, inner;
  int64_t outer_stride, sample_stride, inner_stride;
};

// fisher_diag_ cuts a score into chunks of chunk_rows x kSquareCols entries, one a task. Measured
// on two cores with 2 MB of L2 each: 384 x 192 is within 5 % of the best chunk at every layer of
// ViT-B/32; fewer rows where there would be too few tasks for the threads.
constexpr int64_t kSquareRowsMost = 384, kSquareRowsLeast = 48, kSquareCols = 192;

// Samples of at most so many tokens have their sums over samples in registers.
constexpr int64_t kSquareTokensHeld = 24;

// Samples that are packed together, and the sums of a chunk over all of them.
constexpr int64_t kSquareGroupTokens = 128;

struct SquaresGroup {
  int64_t capacity;      // tokens, at least those of one sample
  const void** dy_rows;  // [capacity]
  const void** x_rows;   // [capacity]
  int64_t* counts;       // [capacity], tokens of each sample
  float *dy, *x, *sums;  // [chunk_rows, capacity], [kSquareCols, capacity], the chunk
  int64_t samples, tokens;
};

struct SquaresCall {
  Rows dy, x;
  DType dtype;
  float* score;  // [rows, cols]
  int64_t score_stride, rows, cols;
  int64_t samples;
  int64_t chunk_rows;
  bool squared;  // dy and x are to be squared, their product is not
  float share;
};

constexpr int64_t kTables = 4;  // score_histogram's, of 2^bits counts each

struct HistogramCall {
  DType dtype;
  uint32_t prefix;
  int64_t shift, bits;
  bool largest;
};

// Each runs the programs begin..end. It returns false, and skips the program, if the index
// contradicts itself.
struct Kernels {
  bool (*sparse_adam)(const AdamCall&, int64_t begin, int64_t end);
  bool (*gather_grad)(const GatherCall&, int64_t begin, int64_t end);
  bool (*scatter)(const DeltaCall&, int64_t begin, int64_t end);
  bool (*add_delta)(const DeltaCall&, int64_t begin, int64_t end);
  void (*fisher_diag)(const SquaresCall&, SquaresGroup&, int64_t begin, int64_t end);
  // Adds the `n` scores from `begin` on to `tables`; returns how many of them are no score.
  int64_t (*score_histogram)(const HistogramCall&, const void* scores, int64_t begin, int64_t n,
                             uint32_t* tables);
};

// The best table for this processor. TALOS_CPU_CAPABILITY=baseline|avx2|avx512 lowers it.
const Kernels& kernels();

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace talos
