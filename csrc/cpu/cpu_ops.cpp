// The ops on the CPU: checks, then the programs dealt out to torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

#include "../checks.h"
#include "kernels.h"

namespace talos {
namespace {

constexpr int64_t kProgramsPerClaim = 8;

// Threads claim programs as they get free: a program's cost follows its density, and blocks of one
// tensor are alike, so equal shares would not be equal work. No program shares an entry with
// another, so the result has the same bits for every number of threads.
template <class Call>
void run_programs(bool (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t n) {
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(n, kProgramsPerClaim));
  std::atomic<int64_t> next{0};
  std::atomic<bool> agrees{true};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(kProgramsPerClaim)) < n;)
      if (!kernel(call, i, std::min(i + kProgramsPerClaim, n))) agrees = false;
  });
  STD_TORCH_CHECK(agrees,
                  "index must be one that Index.pack made, got buffers that contradict each "
                  "other; build the index again");
}

template <class Call>
void run_programs(bool (*kernel)(const Call&, int64_t, int64_t), const Call& call) {
  run_programs(kernel, call, call.index.n_programs);
}

// The table lies in this memory, so each tensor's length can be compared before anything is
// written.
void check_numels(const IndexView& index, const TensorList& tensors, const char* name) {
  for (int64_t i = 0; i < index.n_tensors; ++i) {
    const int64_t expected = index.table[i * kColumns + kNumel];
    const bool skipped = name[0] == 'g' && tensors.numel[i] == 0;
    STD_TORCH_CHECK(skipped || tensors.numel[i] == expected, name, "[", i, "] must have ", expected,
                    " elements as in the index, got ", tensors.numel[i],
                    "; pass the tensors the index was packed for, in its order");
  }
}

// Where each compact gradient begins in rank order; -1 for a dense one.
std::vector<int64_t> compact_ranks(const IndexView& index, const TensorList& grads) {
  std::vector<int64_t> ranks(index.n_tensors, -1);
  for (int64_t i = 0; i < index.n_tensors; ++i) {
    const int64_t* row = index.table + i * kColumns;
    if (grads.numel[i] == 0 || grads.numel[i] == row[kNumel]) continue;
    const int64_t end = end_of_ranks(index, i);
    STD_TORCH_CHECK(grads.numel[i] == end - row[kRank], "grads[", i, "] must have ", row[kNumel],
                    " elements or, of the selected entries, ", end - row[kRank], ", got ",
                    grads.numel[i], "; gather it by the same index");
    ranks[i] = row[kRank];
  }
  return ranks;
}

void sparse_adam_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& index, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                  const std::optional<Tensor>& master, const Tensor& steps, const Tensor& lr,
                  double beta1, double beta2, double eps, double weight_decay, bool maximize,
                  const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                  const std::optional<Tensor>& clip_factor, int64_t seed) {
  const int64_t n = static_cast<int64_t>(params.size());
  const int64_t nnz = exp_avg.numel();
  const TensorList p = checked_params(params, exp_avg);
  const TensorList g = checked_grads(grads, p, exp_avg);
  AdamCall call{};
  call.index = checked_index(index, n, nnz, exp_avg);
  check_numels(call.index, p, "params");
  const std::vector<int64_t> compact_rank = compact_ranks(call.index, g);
  call.params = p.data.data();
  call.grads = g.data.data();
  call.compact_rank = compact_rank.data();
  call.param_dtype = p.dtype;
  call.grad_dtype = g.dtype;
  constexpr ScalarType kFloat = ScalarType::Float;
  call.moment_dtype = checked_moment_dtype(exp_avg);
  const ScalarType moments = scalar_type_of(call.moment_dtype);
  call.exp_avg = checked_array(exp_avg, "exp_avg", moments, nnz, exp_avg);
  call.exp_avg_sq = checked_array(exp_avg_sq, "exp_avg_sq", moments, nnz, exp_avg);
  call.master = checked_array<float>(master, "master", kFloat, nnz, exp_avg);
  call.grad_scale = checked_array<const float>(grad_scale, "grad_scale", kFloat, 1, exp_avg);
  call.clip_factor = checked_array<const float>(clip_factor, "clip_factor", kFloat, 1, exp_avg);
  call.maximize = maximize;
  auto* step = static_cast<float*>(checked_array(steps, "steps", kFloat, n, exp_avg));
  const auto* rate =
      static_cast<const double*>(checked_array(lr, "lr", ScalarType::Double, 1, exp_avg));
  const float* inf = checked_array<const float>(found_inf, "found_inf", kFloat, 1, exp_avg);
  if (inf != nullptr && *inf != 0) return;

  std::vector<AdamScalars> scalars(n);
  for (int64_t i = 0; i < n; ++i) {
    if (g.data[i] == nullptr) continue;
    step[i] += 1;
    scalars[i] = adam_scalars(*rate, step[i], beta1, beta2, weight_decay, seed);
  }
  call.constants = adam_constants(beta1, beta2, eps);
  call.scalars = scalars.data();
  run_programs(kernels().sparse_adam, call);
}

void gather_grad_(const Tensor& out, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& index, bool accumulate) {
  const TensorList g = checked_grads(grads, out);
  GatherCall call{};
  call.index = checked_index(index, static_cast<int64_t>(grads.size()), out.numel(), out);
  check_numels(call.index, g, "grads");
  call.grads = g.data.data();
  call.grad_dtype = g.dtype;
  call.out = static_cast<float*>(checked_array(out, "out", ScalarType::Float, out.numel(), out));
  call.accumulate = accumulate;
  run_programs(kernels().gather_grad, call);
}

DeltaCall checked_delta(const TensorList& params, const std::vector<Tensor>& index,
                        const Tensor& values) {
  DeltaCall call{};
  const int64_t n = static_cast<int64_t>(params.data.size());
  call.index = checked_index(index, n, values.numel(), values);
  check_numels(call.index, params, "params");
  call.params = params.data.data();
  call.param_dtype = params.dtype;
  call.value_dtype = checked_float_dtype(values, "values");
  call.values = checked_array(values, "values", values.scalar_type(), values.numel(), values);
  return call;
}

void scatter_(const std::vector<Tensor>& params, const std::vector<Tensor>& index,
              const Tensor& values) {
  const TensorList p = checked_params(params, values);
  run_programs(kernels().scatter, checked_delta(p, index, values));
}

void add_delta_(const std::vector<Tensor>& params, const std::vector<Tensor>& index,
                const Tensor& values, double scale, const std::optional<Tensor>& saved) {
  const TensorList p = checked_params(params, values);
  DeltaCall call = checked_delta(p, index, values);
  call.scale = static_cast<float>(scale);
  call.saved = checked_array<void>(saved, "saved", scalar_type_of(p.dtype), values.numel(), values);
  run_programs(kernels().add_delta, call);
}

}  // namespace
}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_C, CPU, m) {
  m.impl("sparse_adam_", TORCH_BOX(&talos::sparse_adam_));
  m.impl("gather_grad_", TORCH_BOX(&talos::gather_grad_));
  m.impl("scatter_", TORCH_BOX(&talos::scatter_));
  m.impl("add_delta_", TORCH_BOX(&talos::add_delta_));
}
