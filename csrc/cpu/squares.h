// S[o, i] += share * sum_b (sum_t dY[b, t, o] X[b, t, i])^2 without a gradient in memory: a tile of
// one sample's gradient lives in registers over all its tokens, is squared there, and is added to
// sums that stay in cache over all samples. Included once per instruction set, inside its
// namespace, which provides Lanes (a vector of floats), kLanes, kTileRows,
// spread(a), a in every lane, and fused(a, b, c) = a * b + c.

constexpr int kTileVectors = 3;
constexpr int kTileCols = kTileVectors * kLanes;
constexpr int64_t kTileSize = kTileRows * kTileCols;
static_assert(kSquareRowsLeast % kTileRows == 0 && kSquareCols % kTileCols == 0);

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline Lanes load(const float* in) {
  Lanes lanes;
  std::memcpy(&lanes, in, sizeof(lanes));
  return lanes;
}

inline void add_to(float* out, Lanes lanes) {
  lanes += load(out);
  std::memcpy(out, &lanes, sizeof(lanes));
}

// `dy` [tokens, kTileRows] and `x` [tokens, kTileCols], packed; `sums` [kTileRows, kTileCols].
inline void add_tile(const float* dy, const float* x, int64_t tokens, bool squared, float* sums) {
  Lanes gradient[kTileRows][kTileVectors] = {};
  for (int64_t t = 0; t < tokens; ++t, dy += kTileRows, x += kTileCols) {
    Lanes right[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) right[v] = load(x + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Lanes left = spread(dy[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) gradient[r][v] = fused(left, right[v], gradient[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      const Lanes g = gradient[r][v];
      add_to(sums + r * kTileCols + v * kLanes, squared ? g : g * g);
    }
}

// Columns [begin, end) of one sample's rows, as floats, in panels of `width` columns that lie one
// after another: [panels, tokens, width], zeros beyond `end`.
template <class T>
inline void pack(const Rows& rows, int64_t sample, int64_t begin, int64_t end, int64_t width,
                 bool square, float* out) {
  const T* data = static_cast<const T*>(rows.data) + sample * rows.sample_stride;
  for (int64_t panel = begin; panel < end; panel += width) {
    const int64_t count = least(end - panel, width);
    for (int64_t o = 0; o < rows.outer; ++o)
      for (int64_t i = 0; i < rows.inner; ++i, out += width) {
        const T* in = data + o * rows.outer_stride + i * rows.inner_stride + panel;
        for (int64_t c = 0; c < count; ++c) out[c] = static_cast<float>(in[c]);
        for (int64_t c = count; c < width; ++c) out[c] = 0;
        if (square)
          for (int64_t c = 0; c < count; ++c) out[c] *= out[c];
      }
  }
}

template <class T>
void square_tasks(const SquaresCall& call, float* scratch, int64_t first, int64_t last) {
  const int64_t tokens = call.dy.outer * call.dy.inner;
  const int64_t chunks = ceil_div(call.cols, kSquareCols);
  float* const packed_dy = scratch;
  float* const packed_x = packed_dy + call.chunk_rows * tokens;
  float* const sums = packed_x + kSquareCols * tokens;
  for (int64_t task = first; task < last; ++task) {
    const int64_t row = task / chunks * call.chunk_rows, col = task % chunks * kSquareCols;
    const int64_t row_end = least(row + call.chunk_rows, call.rows);
    const int64_t col_end = least(col + kSquareCols, call.cols);
    const int64_t row_tiles = ceil_div(row_end - row, kTileRows);
    const int64_t col_tiles = ceil_div(col_end - col, kTileCols);
    std::memset(sums, 0, row_tiles * col_tiles * kTileSize * sizeof(float));
    for (int64_t sample = 0; sample < call.samples; ++sample) {
      pack<T>(call.dy, sample, row, row_end, kTileRows, call.squared, packed_dy);
      pack<T>(call.x, sample, col, col_end, kTileCols, call.squared, packed_x);
      for (int64_t c = 0; c < col_tiles; ++c)
        for (int64_t r = 0; r < row_tiles; ++r)
          add_tile(packed_dy + r * tokens * kTileRows, packed_x + c * tokens * kTileCols, tokens,
                   call.squared, sums + (c * row_tiles + r) * kTileSize);
    }
    for (int64_t c = 0; c < col_tiles; ++c)
      for (int64_t r = row; r < row_end; ++r) {
        const int64_t tile = c * row_tiles + (r - row) / kTileRows;
        const float* in = sums + tile * kTileSize + (r - row) % kTileRows * kTileCols;
        float* out = call.score + r * call.score_stride + col + c * kTileCols;
        const int64_t count = least(col_end - col - c * kTileCols, kTileCols);
        for (int64_t i = 0; i < count; ++i) out[i] += call.share * in[i];
      }
  }
}

void fisher_diag(const SquaresCall& call, float* scratch, int64_t first, int64_t last) {
  with_dtype(call.dtype, [&](auto type) {
    square_tasks<decltype(type)>(call, scratch, first, last);
    return true;
  });
}
