// fisher_diag_ on the CPU: checks, then torch's threads compute chunks of a score.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "../checks.h"
#include "kernels.h"

namespace talos {
namespace {

constexpr int64_t kAlignment = 64 / sizeof(float);

Rows checked_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4, name,
                  " must be [outer, samples, inner, features] on the CPU, got ", tensor.dim(),
                  " dimensions; call talos_kernels.fisher_diag_");
  STD_TORCH_CHECK(tensor.stride(3) == 1 || tensor.size(3) <= 1, name,
                  " must have features next to each other, got other strides; call .contiguous()");
  return {tensor.data_ptr(), tensor.size(0),   tensor.size(2),
          tensor.stride(0),  tensor.stride(1), tensor.stride(2)};
}

SquaresCall checked_squares(const Tensor& score, const Tensor& dy, const Tensor& x, double share) {
  SquaresCall call{};
  call.dy = checked_rows(dy, "dys");
  call.x = checked_rows(x, "xs");
  call.dtype = checked_float_dtype(dy, "dys");
  STD_TORCH_CHECK(x.scalar_type() == dy.scalar_type(), "xs must have the dtype of dys, got ",
                  toString(x.scalar_type()), "; cast them first");
  for (int i = 0; i < 3; ++i)
    STD_TORCH_CHECK(x.size(i) == dy.size(i), "xs must have the rows of dys, got ", x.size(i),
                    " and ", dy.size(i), " in dimension ", i);
  STD_TORCH_CHECK(score.is_cpu() && score.dim() == 2 && score.scalar_type() == ScalarType::Float &&
                      score.size(0) == dy.size(3) && score.size(1) == x.size(3) &&
                      (score.stride(1) == 1 || score.size(1) <= 1),
                  "scores must be float32 [", dy.size(3), ", ", x.size(3),
                  "] on the CPU with the columns of a row next to each other");
  call.score = static_cast<float*>(score.data_ptr());
  call.score_stride = score.stride(0);
  call.rows = score.size(0);
  call.cols = score.size(1);
  call.samples = dy.size(1);
  call.share = static_cast<float>(share);
  if (call.dy.outer * call.dy.inner == 1) {  // one token a sample: a product of squares
    call.squared = true;
    for (Rows* rows : {&call.dy, &call.x}) {
      rows->inner = call.samples;
      rows->inner_stride = rows->sample_stride;
    }
    call.samples = 1;
  }
  return call;
}

// What one thread packs into.
struct Scratch {
  explicit Scratch(const SquaresCall& call) {
    const int64_t tokens = std::max(call.dy.outer * call.dy.inner, kSquareGroupTokens);
    const int64_t dy = call.chunk_rows * tokens, x = kSquareCols * tokens;
    rows.reset(new const void*[2 * tokens]);
    counts.reset(new int64_t[tokens]);
    floats.reset(new float[dy + x + call.chunk_rows * kSquareCols + kAlignment]);
    const auto address = reinterpret_cast<uintptr_t>(floats.get()) / sizeof(float);
    float* const aligned = floats.get() + (kAlignment - address % kAlignment) % kAlignment;
    group = {tokens,           rows.get(), rows.get() + tokens,
             counts.get(),     aligned,    aligned + dy,
             aligned + dy + x, 0,          0};
  }

  std::unique_ptr<const void*[]> rows;
  std::unique_ptr<int64_t[]> counts;
  std::unique_ptr<float[]> floats;
  SquaresGroup group;
};

void run(SquaresCall& call) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto tasks = [&] {
    return ceil_div(call.rows, call.chunk_rows) * ceil_div(call.cols, kSquareCols);
  };
  call.chunk_rows = kSquareRowsMost;
  while (call.chunk_rows > kSquareRowsLeast &&
         (tasks() < 2 * threads || call.chunk_rows / 2 >= call.rows))
    call.chunk_rows /= 2;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, tasks()), 1, [&](int64_t, int64_t) {
    Scratch scratch(call);
    for (int64_t task; (task = next.fetch_add(1)) < tasks();)
      kernels().fisher_diag(call, scratch.group, task, task + 1);
  });
}

void fisher_diag_(const std::vector<Tensor>& scores, const std::vector<Tensor>& dys,
                  const std::vector<Tensor>& xs, double share) {
  STD_TORCH_CHECK(dys.size() == scores.size() && xs.size() == scores.size(),
                  "scores, dys and xs must be equally long, got ", scores.size(), ", ", dys.size(),
                  " and ", xs.size());
  std::vector<SquaresCall> calls;
  for (size_t i = 0; i < scores.size(); ++i)
    calls.push_back(checked_squares(scores[i], dys[i], xs[i], share));
  for (SquaresCall& call : calls)
    if (call.rows * call.cols * call.samples * call.dy.outer * call.dy.inner != 0) run(call);
}

}  // namespace
}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_C, CPU, m) {
  m.impl("fisher_diag_", TORCH_BOX(&talos::fisher_diag_));
}
