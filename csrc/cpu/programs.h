// The bodies of the five ops: gather a run's selected entries into scratch that fits the
// first-level cache, do the arithmetic on contiguous floats (the compiler vectorises it), scatter
// them back. Included once per instruction set, inside its namespace.

constexpr int64_t kRunSize = kBlockSize;  // selected entries in scratch at once
constexpr int64_t kPadding = 32;          // written and read by vector copies, never meant

template <class T>
struct Scratch {
  alignas(64) T entries[kRunSize + kPadding];
};

// dense -> out, for the `n` selected entries of `b` from the `begin`-th on.
template <class T>
inline void gather(const T* dense, const Block& b, int64_t begin, int64_t n, T* out) {
  if (b.encoding == kFull) {
    std::memcpy(out, dense, n * sizeof(T));
  } else if (b.encoding == kBitmap) {
    gather_bitmap(dense, b.words, ceil_div(b.dense_count, 32), out);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = dense[b.positions[begin + i]];
  }
}

template <class T>
inline void scatter(T* dense, const Block& b, int64_t begin, int64_t n, const T* in) {
  if (b.encoding == kFull) {
    std::memcpy(dense, in, n * sizeof(T));
  } else if (b.encoding == kBitmap) {
    scatter_bitmap(dense, b.words, ceil_div(b.dense_count, 32), in);
  } else {
    for (int64_t i = 0; i < n; ++i) dense[b.positions[begin + i]] = in[i];
  }
}

// The floats of `in`: `in` itself where it holds floats, else `out`.
template <class T>
inline auto widen(T* in, int64_t n, Scratch<float>& out) {
  if constexpr (std::is_same_v<std::remove_const_t<T>, float>) {
    return in;
  } else {
    for (int64_t i = 0; i < n; ++i) out.entries[i] = static_cast<float>(in[i]);
    return static_cast<std::conditional_t<std::is_const_v<T>, const float, float>*>(out.entries);
  }
}

template <class T>
inline void narrow(const float* in, int64_t n, T* out) {
  if constexpr (std::is_same_v<T, float>) {
    if (in != out) std::memcpy(out, in, n * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
  }
}

// Calls body(block, begin, n, rank) for every run of at most kRunSize entries of the programs
// first .. last - 1.
template <class Body>
inline bool for_runs(const IndexView& index, int64_t first, int64_t last, const Body& body) {
  bool agrees = true;
  for (int64_t program = first; program < last; ++program) {
    Block b;
    if (!find_block(index, program, b)) {
      agrees = false;
      continue;
    }
    for (int64_t begin = 0; begin < b.count; begin += kRunSize)
      body(b, begin, b.count - begin < kRunSize ? b.count - begin : kRunSize, b.rank + begin);
  }
  return agrees;
}

// A weight that other code wrote since the last step wins over its master.
template <class P>
inline void restore_masters(const float* masters, const P* params, int64_t n, float* weights) {
  for (int64_t i = 0; i < n; ++i) {
    const float stored = static_cast<float>(params[i]);
    const float cast = static_cast<float>(static_cast<P>(masters[i]));
    weights[i] = cast == stored ? masters[i] : stored;
  }
}

// The gradients as the step takes them: `in` itself, or changed in `out`.
inline const float* scaled(const AdamCall& call, const float* in, int64_t n, Scratch<float>& out) {
  if (call.grad_scale != nullptr) {
    const float scale = *call.grad_scale;
    for (int64_t i = 0; i < n; ++i) out.entries[i] = in[i] / scale;
    in = out.entries;
  }
  if (call.clip_factor != nullptr || call.maximize) {
    const float clip = call.clip_factor != nullptr ? *call.clip_factor : 1.0f;
    const float factor = call.maximize ? -clip : clip;
    for (int64_t i = 0; i < n; ++i) out.entries[i] = in[i] * factor;
    in = out.entries;
  }
  return in;
}

// The arithmetic waits for divisions; meanwhile it fetches the next block, a strip at a time.
// Gathering alone would wait for memory.
constexpr int64_t kStripSize = 64;

template <class T>
inline void prefetch(const T* dense, int64_t from, int64_t to) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = from / line * line; i < to; i += line) __builtin_prefetch(dense + i);
}

// `shift` selects 16 of an entry's 32 bits of noise.
template <class M>
inline void round_moments(const float* in, const AdamScalars& scalars, int64_t rank, int64_t n,
                          int shift, M* out) {
  if constexpr (!std::is_same_v<M, float>) {
    auto* bits = reinterpret_cast<uint16_t*>(out);
    for (int64_t i = 0; i < n; ++i)
      bits[i] = rounded_stochastically(in[i], noise_bits(scalars.noise_key, rank + i) >> shift);
  }
}

template <class P, class G, class M>
bool adam_programs(const AdamCall& call, int64_t first, int64_t last) {
  Scratch<float> wide_exp_avg, wide_exp_avg_sq;
  Scratch<P> params;
  Scratch<G> grads;
  Scratch<float> wide_params, wide_grads;
  return for_runs(call.index, first, last,
                  [&](const Block& b, int64_t begin, int64_t n, int64_t r) {
                    if (call.grads[b.tensor] == nullptr) return;
                    P* dense = static_cast<P*>(call.params[b.tensor]) + b.dense_begin;
                    const int64_t compact_rank = call.compact_rank[b.tensor];
                    const bool compact = compact_rank >= 0;
                    const G* tensor_grads = static_cast<const G*>(call.grads[b.tensor]);
                    const G* dense_grads = tensor_grads + b.dense_begin;
                    const G* own_grads = grads.entries;
                    if (compact)
                      own_grads = tensor_grads + (r - compact_rank);
                    else
                      gather(dense_grads, b, begin, n, grads.entries);
                    const float* g = scaled(call, widen(own_grads, n, wide_grads), n, wide_grads);
                    gather(static_cast<const P*>(dense), b, begin, n, params.entries);

                    float* w = wide_params.entries;
                    if (call.master != nullptr)
                      restore_masters(call.master + r, params.entries, n, w);
                    else
                      w = widen(params.entries, n, wide_params);

                    const AdamConstants c = call.constants;
                    const AdamScalars s = call.scalars[b.tensor];
                    M* first_moments = static_cast<M*>(call.exp_avg) + r;
                    M* second_moments = static_cast<M*>(call.exp_avg_sq) + r;
                    float* __restrict exp_avg = widen(first_moments, n, wide_exp_avg);
                    float* __restrict exp_avg_sq = widen(second_moments, n, wide_exp_avg_sq);
                    float* __restrict weights = w;
                    const float* __restrict gradients = g;
                    for (int64_t strip = 0; strip < n; strip += kStripSize) {
                      const int64_t end = strip + kStripSize < n ? strip + kStripSize : n;
                      if (b.encoding != kU16) {
                        const int64_t from = kBlockSize * strip / n, to = kBlockSize * end / n;
                        prefetch(dense + kBlockSize, from, to);
                        if (!compact) prefetch(dense_grads + kBlockSize, from, to);
                      }
                      for (int64_t i = strip; i < end; ++i)
                        adam_entry(gradients[i], weights[i], exp_avg[i], exp_avg_sq[i], c, s);
                    }

                    round_moments(exp_avg, s, r, n, 0, first_moments);
                    round_moments(exp_avg_sq, s, r, n, 16, second_moments);

                    if (call.master != nullptr) std::memcpy(call.master + r, w, n * sizeof(float));
                    narrow(w, n, params.entries);
                    scatter(dense, b, begin, n, params.entries);
                  });
}

template <class G>
bool gather_programs(const GatherCall& call, int64_t first, int64_t last) {
  Scratch<G> grads;
  Scratch<float> wide;
  return for_runs(call.index, first, last,
                  [&](const Block& b, int64_t begin, int64_t n, int64_t r) {
                    float* __restrict out = call.out + r;
                    const G* dense = static_cast<const G*>(call.grads[b.tensor]);
                    if (dense != nullptr) {
                      gather(dense + b.dense_begin, b, begin, n, grads.entries);
                      const float* g = widen(grads.entries, n, wide);
                      if (call.accumulate)
                        for (int64_t i = 0; i < n; ++i) out[i] += g[i];
                      else
                        std::memcpy(out, g, n * sizeof(float));
                    } else if (!call.accumulate) {
                      std::memset(out, 0, n * sizeof(float));
                    }
                  });
}

template <class P, class V>
bool scatter_programs(const DeltaCall& call, int64_t first, int64_t last) {
  Scratch<P> params;
  Scratch<float> wide;
  return for_runs(call.index, first, last,
                  [&](const Block& b, int64_t begin, int64_t n, int64_t r) {
                    const V* values = static_cast<const V*>(call.values) + r;
                    P* dense = static_cast<P*>(call.params[b.tensor]) + b.dense_begin;
                    // Of one type bit for bit, NaN payloads too: so an edit is reverted.
                    if constexpr (std::is_same_v<P, V>)
                      std::memcpy(params.entries, values, n * sizeof(P));
                    else
                      narrow(widen(values, n, wide), n, params.entries);
                    scatter(dense, b, begin, n, params.entries);
                  });
}

template <class P, class V>
bool delta_programs(const DeltaCall& call, int64_t first, int64_t last) {
  Scratch<P> params;
  Scratch<float> wide_params, wide_values;
  return for_runs(
      call.index, first, last, [&](const Block& b, int64_t begin, int64_t n, int64_t r) {
        P* dense = static_cast<P*>(call.params[b.tensor]) + b.dense_begin;
        P* entries = params.entries;
        gather(static_cast<const P*>(dense), b, begin, n, entries);
        if (call.saved != nullptr)
          std::memcpy(static_cast<P*>(call.saved) + r, entries, n * sizeof(P));
        float* w = widen(entries, n, wide_params);
        const float* values = widen(static_cast<const V*>(call.values) + r, n, wide_values);
        for (int64_t i = 0; i < n; ++i) w[i] = w[i] + call.scale * values[i];
        narrow(w, n, entries);
        scatter(dense, b, begin, n, entries);
      });
}

bool sparse_adam(const AdamCall& call, int64_t first, int64_t last) {
  return with_dtype(call.param_dtype, [&](auto p) {
    using P = decltype(p);
    const auto with_gradients = [&](auto g) {
      using G = decltype(g);
      return call.moment_dtype == DType::f32 ? adam_programs<P, G, float>(call, first, last)
                                             : adam_programs<P, G, BFloat16>(call, first, last);
    };
    return call.grad_dtype == DType::f32 ? with_gradients(float{}) : with_gradients(P{});
  });
}

bool gather_grad(const GatherCall& call, int64_t first, int64_t last) {
  return with_dtype(call.grad_dtype,
                    [&](auto g) { return gather_programs<decltype(g)>(call, first, last); });
}

bool scatter(const DeltaCall& call, int64_t first, int64_t last) {
  return with_dtype(call.param_dtype, [&](auto p) {
    return with_dtype(call.value_dtype, [&](auto v) {
      return scatter_programs<decltype(p), decltype(v)>(call, first, last);
    });
  });
}

bool add_delta(const DeltaCall& call, int64_t first, int64_t last) {
  return with_dtype(call.param_dtype, [&](auto p) {
    return with_dtype(call.value_dtype, [&](auto v) {
      return delta_programs<decltype(p), decltype(v)>(call, first, last);
    });
  });
}
