// A program's block of dense entries, found in the index and checked against its buffers. Included
// once per instruction set, inside its namespace.

struct Block {
  int64_t tensor;
  int64_t encoding;
  int64_t dense_begin;  // in entries of the tensor
  int64_t dense_count;
  int64_t rank;   // of the first selected entry
  int64_t count;  // selected entries
  const uint32_t* words = nullptr;
  const uint16_t* positions = nullptr;
};

inline bool bitmap_agrees(const Block& b) {
  const int64_t n_words = ceil_div(b.dense_count, 32);
  int64_t count = 0;
  for (int64_t i = 0; i < n_words; ++i) count += __builtin_popcount(b.words[i]);
  const int64_t tail = b.dense_count % 32;
  return count == b.count && (tail == 0 || b.words[n_words - 1] >> tail == 0);
}

inline bool positions_agree(const Block& b) {
  if (b.dense_count == kSegmentSize) return true;  // no 16-bit position lies outside
  uint16_t highest = 0;
  for (int64_t i = 0; i < b.count; ++i)
    highest = b.positions[i] > highest ? b.positions[i] : highest;
  return highest < b.dense_count;
}

// Returns false if the buffers contradict each other, so that a damaged index cannot reach memory
// outside the call's. table[:, NUMEL] was compared with the params before.
inline bool find_block(const IndexView& index, int64_t program, Block& b) {
  b.tensor = index.programs[2 * program];
  if (b.tensor < 0 || b.tensor >= index.n_tensors) return false;
  const int64_t* row = index.table + b.tensor * kColumns;
  b.encoding = row[kEncoding];
  if (b.encoding < kFull || b.encoding > kU16) return false;

  const int64_t size = entries_per_program(b.encoding);
  const int64_t i = index.programs[2 * program + 1];
  if (i < 0 || i >= ceil_div(row[kNumel], size)) return false;
  b.dense_begin = i * size;
  b.dense_count = row[kNumel] - b.dense_begin < size ? row[kNumel] - b.dense_begin : size;

  if (b.encoding == kFull) {
    b.rank = row[kRank] + b.dense_begin;
    b.count = b.dense_count;
  } else {
    const int64_t start = row[kStarts] + i;
    if (start < 0 || start + 1 >= index.n_starts) return false;
    b.rank = index.starts[start];
    b.count = index.starts[start + 1] - b.rank;
  }
  const int64_t end = end_of_ranks(index, b.tensor);
  if (b.count < 0 || b.count > b.dense_count || end > index.nnz) return false;
  if (b.rank < row[kRank] || b.rank < 0 || b.rank > end - b.count) return false;

  if (b.encoding == kBitmap) {
    const int64_t word = row[kData] + i * kWordsPerBlock;
    if (word < 0 || word + ceil_div(b.dense_count, 32) > index.n_words) return false;
    b.words = index.words + word;
    return bitmap_agrees(b);
  }
  if (b.encoding == kU16) {
    const int64_t position = row[kData] + b.rank - row[kRank];
    if (position < 0 || position > index.n_positions - b.count) return false;
    b.positions = index.positions + position;
    return positions_agree(b);
  }
  return true;
}

// Calls f with a value of the type that `dtype` names.
template <class F>
bool with_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) return f(float{});
  return dtype == DType::bf16 ? f(BFloat16{}) : f(Half{});
}
