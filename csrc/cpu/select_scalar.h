// Copies of the selected entries of a run, for every encoding. T is any type of 2 or 4 bytes: bits
// are moved, never converted. Included once per instruction set, inside its namespace.

template <class T>
inline void gather_bitmap(const T* dense, const uint32_t* words, int64_t n_words, T* out) {
  for (int64_t i = 0; i < n_words; ++i, dense += 32)
    for (uint32_t bits = words[i]; bits != 0; bits &= bits - 1) *out++ = dense[__builtin_ctz(bits)];
}

template <class T>
inline void scatter_bitmap(T* dense, const uint32_t* words, int64_t n_words, const T* in) {
  for (int64_t i = 0; i < n_words; ++i, dense += 32)
    for (uint32_t bits = words[i]; bits != 0; bits &= bits - 1) dense[__builtin_ctz(bits)] = *in++;
}
