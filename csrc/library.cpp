// The namespace talos_C: the schemas of the ops in talos_kernels, for programs without Python too.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(talos_C, m) {
  m.def(
      "sparse_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor[] index, Tensor(b!) exp_avg, "
      "Tensor(c!) exp_avg_sq, Tensor(d!)? master, Tensor(e!) steps, Tensor lr, float beta1, "
      "float beta2, float eps, float weight_decay, bool maximize, Tensor? grad_scale, "
      "Tensor? found_inf, Tensor? clip_factor, int seed) -> ()");
  m.def("gather_grad_(Tensor(a!) out, Tensor[] grads, Tensor[] index, bool accumulate) -> ()");
  m.def("scatter_(Tensor(a!)[] params, Tensor[] index, Tensor values) -> ()");
  m.def(
      "add_delta_(Tensor(a!)[] params, Tensor[] index, Tensor values, float scale, "
      "Tensor(b!)? saved) -> ()");
  m.def("fisher_diag_(Tensor(a!)[] scores, Tensor[] dys, Tensor[] xs, float share) -> ()");
  m.def(
      "score_histogram(Tensor[] scores, Tensor prefix, int shift, int bits, bool largest) -> "
      "(Tensor, Tensor)");
}
