// A C++ trainer that trains selected weights only: it loads the compiled library and takes steps of
// sparse Adam through torch's dispatcher. No Python runs.
// ../README.md says how to build it.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

using at::Tensor;

// The op takes a selection as five tensors, which describe all the tensors it is called for.
// Selected entries are numbered in (tensor, flat position) order: that number is an entry's rank,
// and every array with one element a selected entry (exp_avg, exp_avg_sq, ...) lies in this order.
//
//   words      int32 [W]            bitmaps: bit j of word w is entry 32 w + j of its tensor; each
//                                   tensor's is padded with zeros to a multiple of 2048 entries
//   positions  uint16 [P]           of tensors in the encoding `u16`; none here
//   starts     int64 [S]            rank of the first selected entry of each block of 2048 entries,
//                                   and behind each tensor's blocks the rank where they end
//   table      int64 [tensors, 5]   of each tensor: its entries, its encoding (1 is `bitmap`), its
//                                   first rank, its first word, its first element of `starts`
//   programs   int32 [programs, 2]  the tensor and the block that a program works on: one program
//                                   for each block with a selected entry
//
// talos_kernels/index.py defines it, with the encodings that this program does without.
struct Index {
  std::vector<Tensor> buffers;
  int64_t nnz = 0;
};

template <class T>
Tensor tensor_of(std::vector<T> values, at::ScalarType dtype) {
  return at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, dtype).clone();
}

// `selected`: bool, contiguous, one tensor a parameter.
Index pack_bitmaps(const std::vector<Tensor>& selected) {
  constexpr int64_t kBlockSize = 2048, kBitmap = 1;
  std::vector<int32_t> words, programs;
  std::vector<int64_t> starts, table;
  int64_t rank = 0;
  for (size_t tensor = 0; tensor < selected.size(); ++tensor) {
    const bool* chosen = selected[tensor].const_data_ptr<bool>();
    const int64_t numel = selected[tensor].numel();
    const int64_t row[] = {numel, kBitmap, rank, static_cast<int64_t>(words.size()),
                           static_cast<int64_t>(starts.size())};
    for (int64_t block = 0; block < numel; block += kBlockSize) {
      const int64_t first_rank = rank;
      starts.push_back(rank);
      for (int64_t word = block; word < block + kBlockSize; word += 32) {
        uint32_t bits = 0;
        for (int64_t i = word; i < std::min(word + 32, numel); ++i) {
          bits |= static_cast<uint32_t>(chosen[i]) << (i - word);
          rank += chosen[i];
        }
        words.push_back(static_cast<int32_t>(bits));
      }
      if (rank > first_rank) {
        programs.push_back(static_cast<int32_t>(tensor));
        programs.push_back(static_cast<int32_t>(block / kBlockSize));
      }
    }
    starts.push_back(rank);
    table.insert(table.end(), row, row + 5);
  }
  Index index;
  index.buffers = {tensor_of(words, at::kInt), at::empty({0}, at::kUInt16),
                   tensor_of(starts, at::kLong), tensor_of(table, at::kLong).view({-1, 5}),
                   tensor_of(programs, at::kInt).view({-1, 2})};
  index.nnz = rank;
  return index;
}

// The types of the schema in csrc/library.cpp.
using SparseAdam = void(at::TensorList params, at::TensorList grads, at::TensorList index,
                        Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> master,
                        const Tensor& steps, const Tensor& lr, double beta1, double beta2,
                        double eps, double weight_decay, bool maximize,
                        const std::optional<Tensor>& grad_scale,
                        const std::optional<Tensor>& found_inf,
                        const std::optional<Tensor>& clip_factor, int64_t seed);

// Numbers that look random and are the same everywhere, in (-1, 1).
Tensor pattern(at::IntArrayRef shape, int64_t seed) {
  Tensor values = at::empty(shape, at::kFloat);
  float* data = values.mutable_data_ptr<float>();
  for (int64_t i = 0; i < values.numel(); ++i)
    data[i] = static_cast<float>(((i + seed) * 7919 % 1999 - 999) / 1000.0);
  return values;
}

int main(int argc, char** argv) {
  if (argc != 2 || dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "step: %s\n", argc == 2 ? dlerror() : "usage: step PATH_OF_THE_LIBRARY");
    return 2;
  }
  const auto sparse_adam = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("talos_C::sparse_adam_", "")
                               .typed<SparseAdam>();

  // A layer's weight and bias. The gradient of an entry that is not selected is NaN: nobody reads
  // it.
  std::vector<Tensor> params = {pattern({50, 60}, 1), pattern({50}, 2)}, before, selected, grads;
  for (const Tensor& param : params) {
    const Tensor gradient = pattern(param.sizes(), 3);
    before.push_back(param.clone());
    selected.push_back(pattern(param.sizes(), 4) > 0.5);
    grads.push_back(at::where(selected.back(), gradient, std::numeric_limits<float>::quiet_NaN()));
  }
  const Index index = pack_bitmaps(selected);
  Tensor exp_avg = at::zeros({index.nnz}), exp_avg_sq = at::zeros({index.nnz});
  const double lr = 0.01, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.1;
  const Tensor rate = at::full({}, lr, at::kDouble);  // a scheduler fills in another
  const int n_steps = 3;
  const Tensor steps = at::zeros({static_cast<int64_t>(params.size())}, at::kFloat);
  for (int step = 1; step <= n_steps; ++step) {
    sparse_adam.call(params, grads, index.buffers, exp_avg, exp_avg_sq, std::nullopt, steps, rate,
                     beta1, beta2, eps, weight_decay, false, std::nullopt, std::nullopt,
                     std::nullopt, 0);
  }

  // The same in plain arithmetic, in double, one entry after another.
  int64_t trained = 0, changed = 0, entries = 0;
  double error = 0, moved = 0;
  for (size_t tensor = 0; tensor < params.size(); ++tensor) {
    const float* now = params[tensor].const_data_ptr<float>();
    const float* then = before[tensor].const_data_ptr<float>();
    const float* gradient = grads[tensor].const_data_ptr<float>();
    const bool* chosen = selected[tensor].const_data_ptr<bool>();
    entries += params[tensor].numel();
    for (int64_t i = 0; i < params[tensor].numel(); ++i) {
      if (!chosen[i]) {
        changed += now[i] != then[i];
        continue;
      }
      double w = then[i], m = 0, v = 0;
      for (int step = 1; step <= n_steps; ++step) {
        m = beta1 * m + (1 - beta1) * gradient[i];
        v = beta2 * v + (1 - beta2) * gradient[i] * gradient[i];
        w -= lr * weight_decay * w;
        w -= lr * (m / (1 - std::pow(beta1, step))) /
             (std::sqrt(v / (1 - std::pow(beta2, step))) + eps);
      }
      error = std::max(error, std::fabs(now[i] - w));
      moved += std::fabs(now[i] - then[i]);
      ++trained;
    }
  }
  std::printf("%d steps on %lld of %lld entries, which moved by %.5f on average\n", n_steps,
              static_cast<long long>(trained), static_cast<long long>(entries), moved / trained);
  std::printf("%lld other entries changed; largest difference from plain arithmetic: %s\n",
              static_cast<long long>(changed), error < 1e-6 ? "under 1e-6" : "TOO LARGE");
  return changed == 0 && trained == index.nnz && error < 1e-6 ? 0 : 1;
}
