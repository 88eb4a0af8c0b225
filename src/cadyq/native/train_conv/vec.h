// One vector register as a C++ type, for whichever instruction set the including file is compiled. Everything has
// internal linkage: the linker must not mix the copies.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 14;  // 14 x 2 accumulators, 2 operands and a broadcast fill 31 of 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRows = 6;  // 6 x 2 accumulators, 2 operands and a broadcast fill 15 of 16 registers
#else
constexpr int kWidth = 4, kRows = 6;
#endif
constexpr int kPanel = 2 * kWidth;

typedef float Vec __attribute__((vector_size(4 * kWidth)));

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec splat(float f) { return f - Vec{}; }

#if defined(__AVX512F__)
inline Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
inline void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
#elif defined(__AVX2__)
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_first(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline void store_first(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first(n), v); }
#else
inline Vec load_first(const float* p, int n) {
  Vec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store_first(float* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#endif

// The first n lanes; the others are 0.
inline Vec load_n(const float* p, int n) { return n == kWidth ? load(p) : load_first(p, n); }
inline void store_n(float* p, Vec v, int n) { n == kWidth ? store(p, v) : store_first(p, v, n); }

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
