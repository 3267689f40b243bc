// score_histogram on the CPU: checks, then torch's threads count chunks of all tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <string>
#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace talos {
namespace {

constexpr int64_t kChunkSize = 65536;  // entries that a thread claims at a time

// A thread's counts have 32 bits: it adds them to the total before they overflow.
constexpr int64_t kMostEntries = std::numeric_limits<uint32_t>::max() - kChunkSize;

void hand_over(std::vector<uint32_t>& tables, int64_t size, int64_t* counts) {
  for (size_t i = 0; i < tables.size(); ++i) counts[i % size] += tables[i];
  std::fill(tables.begin(), tables.end(), 0);
}

std::tuple<Tensor, Tensor> score_histogram(const std::vector<Tensor>& scores, const Tensor& prefix,
                                           int64_t shift, int64_t bits, bool largest) {
  STD_TORCH_CHECK(shift >= 0 && bits >= 0 && bits <= 16 && shift + bits <= 31,
                  "bits must be at most 16 and end at bit 31 of a key, got ", bits, " above ",
                  shift);
  HistogramCall call{};
  const auto* first =
      static_cast<const int64_t*>(checked_array(prefix, "prefix", ScalarType::Long, 1, prefix));
  call.prefix = static_cast<uint32_t>(*first);
  call.shift = shift;
  call.bits = bits;
  call.largest = largest;
  if (!scores.empty()) call.dtype = checked_float_dtype(scores[0], "scores[0]");
  const ScalarType dtype = scalar_type_of(call.dtype);
  std::vector<const void*> data;
  std::vector<int64_t> ends;  // of each tensor, in chunks of all
  int64_t chunks = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const std::string name = "scores[" + std::to_string(i) + "]";
    const int64_t numel = scores[i].numel();
    data.push_back(checked_array(scores[i], name.c_str(), dtype, numel, prefix));
    ends.push_back(chunks += ceil_div(numel, kChunkSize));
  }

  Tensor counts = torch::stable::new_zeros(prefix, {int64_t{1} << bits});
  Tensor refused = torch::stable::new_zeros(prefix, {static_cast<int64_t>(scores.size())});
  auto* const count = static_cast<int64_t*>(counts.data_ptr());
  auto* const refusals = static_cast<int64_t*>(refused.data_ptr());
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), chunks);
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const int64_t size = int64_t{1} << bits;
    std::vector<uint32_t> tables(kTables * size);
    int64_t counted = 0;
    for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks;) {
      const size_t i = std::upper_bound(ends.begin(), ends.end(), chunk) - ends.begin();
      const int64_t begin = (chunk - (i == 0 ? 0 : ends[i - 1])) * kChunkSize;
      const int64_t n = std::min(scores[i].numel() - begin, kChunkSize);
      const int64_t bad = kernels().score_histogram(call, data[i], begin, n, tables.data());
      counted += n;
      if (bad == 0 && counted <= kMostEntries) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      refusals[i] += bad;
      hand_over(tables, size, count);
      counted = 0;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    hand_over(tables, size, count);
  });
  return {counts, refused};
}

}  // namespace
}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_C, CPU, m) {
  m.impl("score_histogram", TORCH_BOX(&talos::score_histogram));
}
