// As select_scalar.h, 16 entries at a time: 16 bits of the bitmap are the mask of a compress or an
// expand. Loads and stores are masked, so nothing beyond the tensor is read and no unselected entry
// is written. 2-byte entries are widened to 4 bytes for it, which needs no VBMI2.

inline __m512i load_lanes(const void* dense, __mmask16 mask, std::integral_constant<int, 4>) {
  return _mm512_maskz_loadu_epi32(mask, dense);
}

inline __m512i load_lanes(const void* dense, __mmask16 mask, std::integral_constant<int, 2>) {
  return _mm512_maskz_cvtepu16_epi32(mask, _mm256_maskz_loadu_epi16(mask, dense));
}

inline void store_lanes(void* dense, __mmask16 mask, __m512i x, std::integral_constant<int, 4>) {
  _mm512_mask_storeu_epi32(dense, mask, x);
}

inline void store_lanes(void* dense, __mmask16 mask, __m512i x, std::integral_constant<int, 2>) {
  _mm256_mask_storeu_epi16(dense, mask, _mm512_maskz_cvtepi32_epi16(mask, x));
}

template <class T>
inline void gather_half(const T*& dense, __mmask16 mask, T*& out) {
  constexpr std::integral_constant<int, sizeof(T)> width{};
  const __m512i x = _mm512_maskz_compress_epi32(mask, load_lanes(dense, mask, width));
  store_lanes(out, 0xffff, x, width);  // past the count too: scratch has kPadding entries more
  dense += 16;
  out += __builtin_popcount(mask);
}

template <class T>
inline void scatter_half(T*& dense, __mmask16 mask, const T*& in) {
  constexpr std::integral_constant<int, sizeof(T)> width{};
  const __m512i x = _mm512_maskz_expand_epi32(mask, load_lanes(in, 0xffff, width));
  store_lanes(dense, mask, x, width);
  dense += 16;
  in += __builtin_popcount(mask);
}

template <class T>
inline void gather_bitmap(const T* dense, const uint32_t* words, int64_t n_words, T* out) {
  for (int64_t i = 0; i < n_words; ++i) {
    gather_half(dense, static_cast<__mmask16>(words[i]), out);
    gather_half(dense, static_cast<__mmask16>(words[i] >> 16), out);
  }
}

template <class T>
inline void scatter_bitmap(T* dense, const uint32_t* words, int64_t n_words, const T* in) {
  for (int64_t i = 0; i < n_words; ++i) {
    scatter_half(dense, static_cast<__mmask16>(words[i]), in);
    scatter_half(dense, static_cast<__mmask16>(words[i] >> 16), in);
  }
}
