// Argument checks shared by the CPU and CUDA ops. Each raises before anything is written.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "layout.h"

namespace talos {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tensors of one dtype, as raw pointers. A tensor that takes no part has data == nullptr.
struct TensorList {
  DType dtype = DType::f32;
  std::vector<void*> data;
  std::vector<int64_t> numel;
};

// `anchor` is the tensor whose device the call runs on.
TensorList checked_params(const std::vector<Tensor>& params, const Tensor& anchor);

// The gradients of `params`: each as long as its param; or shorter if it is compact, which the op
// compares with the index; or empty if its param is skipped.
TensorList checked_grads(const std::vector<Tensor>& grads, const TensorList& params,
                         const Tensor& anchor);

// As above without params: the op compares the lengths with the index.
TensorList checked_grads(const std::vector<Tensor>& grads, const Tensor& anchor);

// `n_tensors` is the length of the call's tensor lists, `nnz` that of its per-entry arrays.
IndexView checked_index(const std::vector<Tensor>& index, int64_t n_tensors, int64_t nnz,
                        const Tensor& anchor);

// A contiguous array of `numel` elements of one dtype.
void* checked_array(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel,
                    const Tensor& anchor);

// A contiguous array of a floating dtype that kernels can read.
DType checked_float_dtype(const Tensor& tensor, const char* name);
DType checked_moment_dtype(const Tensor& exp_avg);
ScalarType scalar_type_of(DType dtype);

template <class T>
T* checked_array(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype,
                 int64_t numel, const Tensor& anchor) {
  return tensor ? static_cast<T*>(checked_array(*tensor, name, dtype, numel, anchor)) : nullptr;
}

}  // namespace talos
