// S[o, i] += share * sum_b (sum_t dY[b, t, o] X[b, t, i])^2 without a gradient in memory. A tile of
// one sample's gradient stays in registers over all its tokens and is squared there. The sums over
// samples stay in registers if samples are short, else in cache. Included once per instruction set,
// inside its namespace, which provides Lanes (a vector of floats), kLanes, kTileRows, spread(a) (a
// in every lane) and fused(a, b, c) = a * b + c.

constexpr int kTileVectors = 3;
constexpr int kTileCols = kTileVectors * kLanes;
static_assert(kSquareRowsLeast % kTileRows == 0 && kSquareCols % kTileCols == 0);

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline Lanes load(const float* in) {
  Lanes lanes;
  std::memcpy(&lanes, in, sizeof(lanes));
  return lanes;
}

inline void store(float* out, Lanes lanes) { std::memcpy(out, &lanes, sizeof(lanes)); }

// One tile [kRows, kTileCols] of the sums over the samples of a group, `dy` [tokens, kRows] and `x`
// [tokens, kTileCols] packed. With kHeld the sums take as many registers as the gradient.
template <int kRows, bool kHeld>
inline void add_tile(const SquaresGroup& group, const float* dy, const float* x, bool squared,
                     float* sums) {
  Lanes held[kRows][kTileVectors] = {};
  for (int64_t sample = 0; sample < group.samples; ++sample) {
    Lanes gradient[kRows][kTileVectors] = {};
    for (int64_t t = 0; t < group.counts[sample]; ++t, dy += kRows, x += kTileCols) {
      Lanes right[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) right[v] = load(x + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Lanes left = spread(dy[r]);
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v)
          gradient[r][v] = fused(left, right[v], gradient[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        const Lanes g = gradient[r][v];
        float* const sum = sums + r * kTileCols + v * kLanes;
        if (kHeld)
          held[r][v] = fused(g, g, held[r][v]);
        else
          store(sum, squared ? load(sum) + g : fused(g, g, load(sum)));
      }
  }
  if (kHeld)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        float* const sum = sums + r * kTileCols + v * kLanes;
        store(sum, load(sum) + held[r][v]);
      }
}

// Adds a sample's tokens to the group, except those whose dY is zero in columns [begin, end), such
// as padding's, which add nothing.
template <class T>
inline void add_sample(const SquaresCall& call, int64_t sample, int64_t begin, int64_t end,
                       SquaresGroup& group) {
  const T* dy = static_cast<const T*>(call.dy.data) + sample * call.dy.sample_stride;
  const T* x = static_cast<const T*>(call.x.data) + sample * call.x.sample_stride;
  const int64_t before = group.tokens;
  for (int64_t o = 0; o < call.dy.outer; ++o)
    for (int64_t i = 0; i < call.dy.inner; ++i) {
      const T* row = dy + o * call.dy.outer_stride + i * call.dy.inner_stride;
      int64_t c = begin;
      while (c < end && static_cast<float>(row[c]) == 0) ++c;
      if (c == end) continue;
      group.dy_rows[group.tokens] = row;
      group.x_rows[group.tokens] = x + o * call.x.outer_stride + i * call.x.inner_stride;
      ++group.tokens;
    }
  if (group.tokens > before) group.counts[group.samples++] = group.tokens - before;
}

// Columns [begin, end) of rows, as floats, in panels of `width` columns that lie one after another:
// [panels, tokens, width], zeros beyond `end`.
template <class T>
inline void pack(const void* const* rows, int64_t tokens, int64_t begin, int64_t end, int64_t width,
                 bool square, float* out) {
  for (int64_t panel = begin; panel < end; panel += width) {
    const int64_t count = least(end - panel, width);
    for (int64_t t = 0; t < tokens; ++t, out += width) {
      const T* in = static_cast<const T*>(rows[t]) + panel;
      for (int64_t c = 0; c < count; ++c) out[c] = static_cast<float>(in[c]);
      for (int64_t c = count; c < width; ++c) out[c] = 0;
      if (square)
        for (int64_t c = 0; c < count; ++c) out[c] *= out[c];
    }
  }
}

template <class T, int kRows, bool kHeld>
void square_tasks(const SquaresCall& call, SquaresGroup& group, int64_t first, int64_t last) {
  constexpr int64_t kTileSize = kRows * kTileCols;
  const int64_t sample_tokens = call.dy.outer * call.dy.inner;
  const int64_t chunks = ceil_div(call.cols, kSquareCols);
  for (int64_t task = first; task < last; ++task) {
    const int64_t row = task / chunks * call.chunk_rows, col = task % chunks * kSquareCols;
    const int64_t row_end = least(row + call.chunk_rows, call.rows);
    const int64_t col_end = least(col + kSquareCols, call.cols);
    const int64_t row_tiles = ceil_div(row_end - row, kRows);
    const int64_t col_tiles = ceil_div(col_end - col, kTileCols);
    std::memset(group.sums, 0, row_tiles * col_tiles * kTileSize * sizeof(float));
    for (int64_t sample = 0; sample < call.samples;) {
      group.samples = group.tokens = 0;
      do add_sample<T>(call, sample++, row, row_end, group);
      while (sample < call.samples && group.tokens + sample_tokens <= group.capacity);
      const int64_t tokens = group.tokens;
      pack<T>(group.dy_rows, tokens, row, row_end, kRows, call.squared, group.dy);
      pack<T>(group.x_rows, tokens, col, col_end, kTileCols, call.squared, group.x);
      for (int64_t c = 0; c < col_tiles; ++c)
        for (int64_t r = 0; r < row_tiles; ++r)
          add_tile<kRows, kHeld>(group, group.dy + r * tokens * kRows,
                                 group.x + c * tokens * kTileCols, call.squared,
                                 group.sums + (c * row_tiles + r) * kTileSize);
    }
    for (int64_t c = 0; c < col_tiles; ++c)
      for (int64_t r = row; r < row_end; ++r) {
        const int64_t tile = c * row_tiles + (r - row) / kRows;
        const float* in = group.sums + tile * kTileSize + (r - row) % kRows * kTileCols;
        float* out = call.score + r * call.score_stride + col + c * kTileCols;
        const int64_t count = least(col_end - col - c * kTileCols, kTileCols);
        for (int64_t i = 0; i < count; ++i) out[i] += call.share * in[i];
      }
  }
}

void fisher_diag(const SquaresCall& call, SquaresGroup& group, int64_t first, int64_t last) {
  const bool held = !call.squared && call.dy.outer * call.dy.inner <= kSquareTokensHeld;
  with_dtype(call.dtype, [&](auto type) {
    if (held)
      square_tasks<decltype(type), kTileRows / 2, true>(call, group, first, last);
    else
      square_tasks<decltype(type), kTileRows, false>(call, group, first, last);
    return true;
  });
}
