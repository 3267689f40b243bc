#include "checks.h"

#include <string>

namespace talos {
namespace {

std::string item(const char* name, size_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device:") + std::to_string(tensor.get_device_index());
}

void check_place(const Tensor& tensor, const std::string& name, const Tensor& anchor) {
  const bool same = tensor.is_cpu() == anchor.is_cpu() && tensor.is_cuda() == anchor.is_cuda() &&
                    tensor.get_device_index() == anchor.get_device_index();
  STD_TORCH_CHECK(same, name, " must be on ", device_name(anchor), ", got ", device_name(tensor),
                  "; move it there first");
  STD_TORCH_CHECK(tensor.is_contiguous(), name,
                  " must be contiguous, got other strides; call .contiguous() first");
}

void check_dtype(const Tensor& tensor, const std::string& name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must have dtype ", toString(dtype),
                  ", got ", toString(tensor.scalar_type()), "; cast it first");
}

void check_numel(const Tensor& tensor, const std::string& name, int64_t numel) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements, got ",
                  tensor.numel(), "; build it from the same index");
}

void append(TensorList& list, const Tensor& tensor) {
  list.data.push_back(tensor.numel() == 0 ? nullptr : tensor.data_ptr());
  list.numel.push_back(tensor.numel());
}

}  // namespace

ScalarType scalar_type_of(DType dtype) {
  if (dtype == DType::f32) return ScalarType::Float;
  return dtype == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

DType checked_float_dtype(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      name, " must be float32, bfloat16 or float16, got ", toString(dtype), "; cast it first");
  if (dtype == ScalarType::Float) return DType::f32;
  return dtype == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
}

DType checked_moment_dtype(const Tensor& exp_avg) {
  const DType dtype = checked_float_dtype(exp_avg, "exp_avg");
  STD_TORCH_CHECK(dtype != DType::f16,
                  "exp_avg must be float32 or bfloat16, got float16, whose range is too small for "
                  "squares; cast it first");
  return dtype;
}

void* checked_array(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel,
                    const Tensor& anchor) {
  check_dtype(tensor, name, dtype);
  check_place(tensor, name, anchor);
  check_numel(tensor, name, numel);
  return tensor.data_ptr();
}

TensorList checked_params(const std::vector<Tensor>& params, const Tensor& anchor) {
  TensorList list;
  if (!params.empty()) list.dtype = checked_float_dtype(params[0], "params[0]");
  for (size_t i = 0; i < params.size(); ++i) {
    check_dtype(params[i], item("params", i), scalar_type_of(list.dtype));
    check_place(params[i], item("params", i), anchor);
    append(list, params[i]);
  }
  return list;
}

TensorList checked_grads(const std::vector<Tensor>& grads, const Tensor& anchor) {
  TensorList list;
  bool first = true;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].numel() != 0) {  // an empty one stands for "no gradient": its dtype says nothing
      if (first) list.dtype = checked_float_dtype(grads[i], item("grads", i).c_str());
      first = false;
      check_dtype(grads[i], item("grads", i), scalar_type_of(list.dtype));
      check_place(grads[i], item("grads", i), anchor);
    }
    append(list, grads[i]);
  }
  return list;
}

TensorList checked_grads(const std::vector<Tensor>& grads, const TensorList& params,
                         const Tensor& anchor) {
  STD_TORCH_CHECK(grads.size() == params.data.size(), "grads must have one tensor per param (",
                  params.data.size(), "), got ", grads.size(),
                  "; pass an empty tensor where there is no gradient");
  const TensorList list = checked_grads(grads, anchor);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (list.numel[i] == 0) continue;
    STD_TORCH_CHECK(list.numel[i] <= params.numel[i], item("grads", i), " must have at most ",
                    params.numel[i], " elements as its param, got ", list.numel[i],
                    "; pass the gradients in the order of params");
    STD_TORCH_CHECK(list.dtype == params.dtype || list.dtype == DType::f32,
                    "grads must have the dtype of params (", toString(scalar_type_of(params.dtype)),
                    ") or Float, got ", toString(scalar_type_of(list.dtype)), "; cast them first");
  }
  return list;
}

IndexView checked_index(const std::vector<Tensor>& index, int64_t n_tensors, int64_t nnz,
                        const Tensor& anchor) {
  constexpr const char* kNames[] = {"index[0] (words)", "index[1] (positions)", "index[2] (starts)",
                                    "index[3] (table)", "index[4] (programs)"};
  constexpr ScalarType kTypes[] = {ScalarType::Int, ScalarType::UInt16, ScalarType::Long,
                                   ScalarType::Long, ScalarType::Int};
  STD_TORCH_CHECK(index.size() == 5, "index must have 5 tensors, got ", index.size(),
                  "; pass Index.buffers");
  const void* data[5];
  for (size_t i = 0; i < 5; ++i)
    data[i] = checked_array(index[i], kNames[i], kTypes[i], index[i].numel(), anchor);
  STD_TORCH_CHECK(index[3].numel() == n_tensors * kColumns, kNames[3], " must have ", n_tensors,
                  " rows of ", static_cast<int64_t>(kColumns), " columns, got ", index[3].numel(),
                  " elements; pass the index that was packed for these tensors");
  return {static_cast<const uint32_t*>(data[0]),
          static_cast<const uint16_t*>(data[1]),
          static_cast<const int64_t*>(data[2]),
          static_cast<const int64_t*>(data[3]),
          static_cast<const int32_t*>(data[4]),
          index[0].numel(),
          index[1].numel(),
          index[2].numel(),
          n_tensors,
          index[4].numel() / 2,
          nnz};
}

}  // namespace talos
