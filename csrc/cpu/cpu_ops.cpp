// The ops on the CPU: their programs run on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

#include "../ops.h"
#include "kernels.h"

namespace talos {
namespace {

constexpr int64_t kProgramsPerClaim = 8;

// Free threads claim programs: a program's cost depends on its density, so equal shares would not
// be equal work. Programs share no entry, so every number of threads gives the same bits.
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

DeltaCall delta_call(const DeltaArguments& arguments, const TensorList& params) {
  check_numels(arguments.index, params, "params");
  return {arguments, params.data.data()};
}

void scatter_(const std::vector<Tensor>& params, const std::vector<Tensor>& index,
              const Tensor& values) {
  const TensorList p = checked_params(params, values);
  run_programs(kernels().scatter, delta_call(checked_delta(p, index, values), p));
}

struct Cpu {
  static void sparse_adam(const AdamArguments& a, const TensorList& params, const TensorList& grads,
                          const Tensor&) {
    check_numels(a.index, params, "params");
    const std::vector<int64_t> compact_rank = compact_ranks(a.index, grads);
    if (a.found_inf != nullptr && *a.found_inf != 0) return;
    std::vector<AdamScalars> scalars(a.index.n_tensors);
    for (int64_t i = 0; i < a.index.n_tensors; ++i) {
      if (grads.data[i] == nullptr) continue;
      a.steps[i] += 1;
      scalars[i] = adam_scalars(*a.lr, a.steps[i], a.beta1, a.beta2, a.weight_decay, a.seed);
    }
    run_programs(kernels().sparse_adam, AdamCall{a, params.data.data(), grads.data.data(),
                                                 compact_rank.data(), scalars.data()});
  }

  static void add_delta(const DeltaArguments& a, const TensorList& params, const Tensor&) {
    run_programs(kernels().add_delta, delta_call(a, params));
  }
};

}  // namespace
}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_C, CPU, m) {
  m.impl("sparse_adam_", TORCH_BOX(&talos::sparse_adam_<talos::Cpu>));
  m.impl("gather_grad_", TORCH_BOX(&talos::gather_grad_));
  m.impl("scatter_", TORCH_BOX(&talos::scatter_));
  m.impl("add_delta_", TORCH_BOX(&talos::add_delta_<talos::Cpu>));
}
