// Counts the digits of scores' keys; talos_kernels/select_threshold.py defines both. Included once
// per instruction set, inside its namespace.

constexpr uint32_t kHighestFinite = 0x7f7fffff;  // the largest key of a score
constexpr uint32_t kNegativeZero = 0x80000000;
constexpr int64_t kGroup = 32;  // entries looked at together; most groups of a later pass are
                                // passed over

// Digits go to kTables tables in turn: if many entries share a digit, an increment waits for the
// one before it in the same table.
inline void count_digits(const uint32_t* digits, int64_t n, int64_t bits, uint32_t* tables) {
  for (int64_t i = 0; i < n; ++i) ++tables[((i % kTables) << bits) + digits[i]];
}

// Returns how many of the group are no score.
template <class S>
inline int64_t count_group(const HistogramCall& call, const S* scores, uint32_t* tables) {
  // (bits ^ flip) + offset is bits, or kHighestFinite - bits.
  const uint32_t flip = call.largest ? 0xffffffff : 0;
  const uint32_t offset = call.largest ? kHighestFinite + 1 : 0;
  const uint32_t excluded = call.largest ? 0x7fffffff : kHighestFinite + 1;  // the infinity's key
  const uint32_t shift = static_cast<uint32_t>(call.shift);
  const uint32_t width = shift + static_cast<uint32_t>(call.bits);
  const uint32_t prefix = call.prefix, mask = (uint32_t{1} << call.bits) - 1;
  uint32_t digits[kGroup], found[kGroup], n_found = 0, n_refused = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    const float score = static_cast<float>(scores[i]);
    uint32_t key;
    std::memcpy(&key, &score, sizeof(key));
    key = ((key == kNegativeZero ? 0 : key) ^ flip) + offset;
    found[i] = (key <= kHighestFinite) & (key >> width == prefix);
    n_found += found[i];
    n_refused += (key > kHighestFinite) & (key != excluded);
    digits[i] = key >> shift & mask;
  }
  if (n_found == kGroup) {
    count_digits(digits, kGroup, call.bits, tables);
  } else if (n_found != 0) {
    uint32_t n = 0;
    for (int64_t i = 0; i < kGroup; ++i) {
      digits[n] = digits[i];
      n += found[i];
    }
    count_digits(digits, n, call.bits, tables);
  }
  return n_refused;
}

template <class S>
int64_t count_scores(const HistogramCall& call, const S* scores, int64_t n, uint32_t* tables) {
  int64_t refused = 0, i = 0;
  for (; i + kGroup <= n; i += kGroup) refused += count_group(call, scores + i, tables);
  if (i == n) return refused;
  S rest[kGroup];  // filled up with what counts for nothing
  const float none = call.largest ? -__builtin_inff() : __builtin_inff();
  for (int64_t k = 0; k < kGroup; ++k) rest[k] = k < n - i ? scores[i + k] : static_cast<S>(none);
  return refused + count_group(call, rest, tables);
}

int64_t score_histogram(const HistogramCall& call, const void* scores, int64_t begin, int64_t n,
                        uint32_t* tables) {
  int64_t refused = 0;
  with_dtype(call.dtype, [&](auto s) {
    using S = decltype(s);
    refused = count_scores(call, static_cast<const S*>(scores) + begin, n, tables);
    return true;
  });
  return refused;
}
