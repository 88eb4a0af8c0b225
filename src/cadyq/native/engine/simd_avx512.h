// The vector operations that the shared kernels are written in, for AVX-512 (F, BW, DQ, VL).
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"
#include "scalar.h"

namespace cadyq_avx512 {

#define CADYQ_INLINE __attribute__((always_inline)) inline

constexpr int kLanes = 16;  // 32-bit lanes; int16 vectors have twice as many

using I16 = __m512i;
using I32 = __m512i;
using F32 = __m512;

template <bool Unsigned>
CADYQ_INLINE I16 load_codes(const uint8_t* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Unsigned ? _mm512_cvtepu8_epi16(v) : _mm512_cvtepi8_epi16(v);
}
CADYQ_INLINE void store16(int16_t* p, I16 v) { _mm512_store_si512(p, v); }
CADYQ_INLINE I16 add16(I16 a, I16 b) { return _mm512_add_epi16(a, b); }
CADYQ_INLINE I16 sub16(I16 a, I16 b) { return _mm512_sub_epi16(a, b); }
template <int N>
CADYQ_INLINE I16 shl16(I16 a) {
  return _mm512_slli_epi16(a, N);
}
CADYQ_INLINE I32 load32(const int32_t* p) { return _mm512_loadu_si512(p); }
CADYQ_INLINE I32 add32(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
CADYQ_INLINE I32 sub32(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
CADYQ_INLINE I32 mul32(I32 a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
template <int N>
CADYQ_INLINE I32 shl32(I32 a) {
  return _mm512_slli_epi32(a, N);
}
CADYQ_INLINE F32 load_f32(const float* p) { return _mm512_loadu_ps(p); }
CADYQ_INLINE F32 to_f32(I32 a) { return _mm512_cvtepi32_ps(a); }
CADYQ_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
CADYQ_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
CADYQ_INLINE F32 activate(F32 t, F32 slope) {
  return _mm512_mask_mul_ps(t, _mm512_movepi32_mask(_mm512_castps_si512(t)), t, slope);
}
CADYQ_INLINE F32 rounded(F32 t) { return _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// rint(t) clamped to a range of integers, as a float
CADYQ_INLINE F32 round_clamped(F32 t, F32 low, F32 high) { return _mm512_max_ps(_mm512_min_ps(rounded(t), high), low); }
CADYQ_INLINE F32 larger(F32 a, F32 b) { return _mm512_max_ps(a, b); }
CADYQ_INLINE F32 splat(float v) { return _mm512_set1_ps(v); }
CADYQ_INLINE I32 rint32(F32 a) { return _mm512_cvtps_epi32(a); }
template <bool Unsigned>
CADYQ_INLINE F32 load_code_f32(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(Unsigned ? _mm512_cvtepu8_epi32(x) : _mm512_cvtepi8_epi32(x));
}
CADYQ_INLINE F32 load16_f32(const int16_t* p) {
  return to_f32(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

// Saturates to int16 and stores one vector; with a residual the saturated values are added, saturating.
CADYQ_INLINE void store_int16(int16_t* p, I32 v, const int16_t* residual, bool rectify) {
  __m256i r = _mm512_cvtsepi32_epi16(v);
  if (residual) r = _mm256_adds_epi16(r, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(residual)));
  if (rectify) r = _mm256_max_epi16(r, _mm256_setzero_si256());
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), r);
}

struct Clamp {
  __m512i low8, high8, flip;
  __m256i low16, high16;
  bool is_unsigned;
  CADYQ_INLINE explicit Clamp(const CadyqQuantizer& q)
      : low8(_mm512_set1_epi8(static_cast<char>(q.low))),
        high8(_mm512_set1_epi8(static_cast<char>(q.high))),
        flip(_mm512_set1_epi8(static_cast<char>(q.flip))),
        low16(_mm256_set1_epi16(static_cast<short>(q.low))),
        high16(_mm256_set1_epi16(static_cast<short>(q.high))),
        is_unsigned(q.is_unsigned != 0) {}
};

// Four vectors to four groups of 8-bit codes, in one register: group i in 128-bit lane i.
template <bool Unsigned>
CADYQ_INLINE __m512i pack_codes(const I32 v[4], const Clamp& c) {
  const __m512i a = _mm512_packs_epi32(v[0], v[1]), b = _mm512_packs_epi32(v[2], v[3]);
  __m512i p = Unsigned ? _mm512_min_epu8(_mm512_packus_epi16(a, b), c.high8)
                            : _mm512_min_epi8(_mm512_max_epi8(_mm512_packs_epi16(a, b), c.low8), c.high8);
  p = _mm512_xor_si512(p, c.flip);
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), p);
}
CADYQ_INLINE __m512i pack_codes(const I32 v[4], const Clamp& c) {
  return c.is_unsigned ? pack_codes<true>(v, c) : pack_codes<false>(v, c);
}
// Codes of four vectors that lie side by side.
CADYQ_INLINE void store_run(uint8_t* p, const I32 v[4], const Clamp& c) { _mm512_storeu_si512(p, pack_codes(v, c)); }
// Codes of the same channels of up to four pixels, `stride` bytes apart.
CADYQ_INLINE void store_codes(uint8_t* p, size_t stride, int n, const I32 v[4], const Clamp& c) {
  const __m512i k = pack_codes(v, c);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(k));
  if (n > 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(p + stride), _mm512_extracti32x4_epi32(k, 1));
  if (n > 2) _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * stride), _mm512_extracti32x4_epi32(k, 2));
  if (n > 3) _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 3 * stride), _mm512_extracti32x4_epi32(k, 3));
}
// Codes of 64 channels of one pixel.
template <int Pixels>
CADYQ_INLINE void store_pixels(uint8_t* p, size_t /*stride*/, const I32 v[4], const Clamp& c) {
  static_assert(Pixels == 1);
  store_run(p, v, c);
}
CADYQ_INLINE void store_code16(int16_t* p, I32 v, const Clamp& c) {
  const __m256i r = _mm256_min_epi16(_mm256_max_epi16(_mm512_cvtsepi32_epi16(v), c.low16), c.high16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), r);
}

CADYQ_INLINE I16 load16(const int16_t* p) { return _mm512_loadu_si512(p); }
CADYQ_INLINE I16 splat16(int16_t v) { return _mm512_set1_epi16(v); }
// Values of a and b in turn, from the first or second half of each 128-bit lane.
CADYQ_INLINE I16 interleave_low16(I16 a, I16 b) { return _mm512_unpacklo_epi16(a, b); }
CADYQ_INLINE I16 interleave_high16(I16 a, I16 b) { return _mm512_unpackhi_epi16(a, b); }
CADYQ_INLINE I16 upper_product16(I16 a, I16 b) { return _mm512_mulhi_epi16(a, b); }
// Adds the products of neighboring pairs.
CADYQ_INLINE I32 add_dot16(I32 total, I16 a, I16 b) { return _mm512_dpwssd_epi32(total, a, b); }
CADYQ_INLINE void store32(int32_t* p, I32 v) { _mm512_store_si512(p, v); }
CADYQ_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
CADYQ_INLINE I32 zero32() { return _mm512_setzero_si512(); }

}  // namespace cadyq_avx512
