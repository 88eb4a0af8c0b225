// The vector operations that the shared kernels are written in, for NEON.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "kernels.h"
#include "scalar.h"

namespace cadyq_neon {

#define CADYQ_INLINE __attribute__((always_inline)) inline

constexpr int kLanes = 4;  // 32-bit lanes; int16 vectors have twice as many

using I16 = int16x8_t;
using I32 = int32x4_t;
using F32 = float32x4_t;

CADYQ_INLINE I32 load32(const int32_t* p) { return vld1q_s32(p); }
CADYQ_INLINE I32 add32(I32 a, I32 b) { return vaddq_s32(a, b); }
CADYQ_INLINE I32 zero32() { return vdupq_n_s32(0); }
CADYQ_INLINE F32 load_f32(const float* p) { return vld1q_f32(p); }
CADYQ_INLINE F32 splat(float v) { return vdupq_n_f32(v); }
CADYQ_INLINE F32 to_f32(I32 a) { return vcvtq_f32_s32(a); }
CADYQ_INLINE F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
CADYQ_INLINE F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
CADYQ_INLINE F32 activate(F32 t, F32 slope) { return vbslq_f32(vcltzq_f32(t), mul(t, slope), t); }
// rint(t) clamped to a range of integers, as a float
CADYQ_INLINE F32 round_clamped(F32 t, F32 low, F32 high) { return vmaxq_f32(vminq_f32(vrndnq_f32(t), high), low); }
CADYQ_INLINE I32 rint32(F32 a) { return vcvtnq_s32_f32(a); }
CADYQ_INLINE F32 load16_f32(const int16_t* p) { return to_f32(vmovl_s16(vld1_s16(p))); }

// Saturates to int16 and stores one vector; with a residual the saturated values are added, saturating.
CADYQ_INLINE void store_int16(int16_t* p, I32 v, const int16_t* residual, bool rectify) {
  int16x4_t r = vqmovn_s32(v);
  if (residual) r = vqadd_s16(r, vld1_s16(residual));
  if (rectify) r = vmax_s16(r, vdup_n_s16(0));
  vst1_s16(p, r);
}

struct Clamp {
  int8x16_t low8, high8;
  uint8x16_t high_unsigned8, flip;
  int16x4_t low16, high16;
  bool is_unsigned;
  CADYQ_INLINE explicit Clamp(const CadyqQuantizer& q)
      : low8(vdupq_n_s8(static_cast<int8_t>(q.low))),
        high8(vdupq_n_s8(static_cast<int8_t>(q.high))),
        high_unsigned8(vdupq_n_u8(static_cast<uint8_t>(q.high))),
        flip(vdupq_n_u8(q.flip)),
        low16(vdup_n_s16(static_cast<int16_t>(q.low))),
        high16(vdup_n_s16(static_cast<int16_t>(q.high))),
        is_unsigned(q.is_unsigned != 0) {}
};

// Four vectors to four groups of 8-bit codes, in one register: group i in 32-bit lane i.
CADYQ_INLINE uint8x16_t pack_codes(const I32 v[4], const Clamp& c) {
  const int16x8_t a = vqmovn_high_s32(vqmovn_s32(v[0]), v[1]), b = vqmovn_high_s32(vqmovn_s32(v[2]), v[3]);
  uint8x16_t p;
  if (c.is_unsigned)
    p = vminq_u8(vqmovun_high_s16(vqmovun_s16(a), b), c.high_unsigned8);
  else
    p = vreinterpretq_u8_s8(vminq_s8(vmaxq_s8(vqmovn_high_s16(vqmovn_s16(a), b), c.low8), c.high8));
  return veorq_u8(p, c.flip);
}
// Codes of four vectors that lie side by side.
CADYQ_INLINE void store_run(uint8_t* p, const I32 v[4], const Clamp& c) { vst1q_u8(p, pack_codes(v, c)); }
// Codes of the same channels of up to four pixels, `stride` bytes apart.
CADYQ_INLINE void store_codes(uint8_t* p, size_t stride, int n, const I32 v[4], const Clamp& c) {
  const uint32x4_t k = vreinterpretq_u32_u8(pack_codes(v, c));
  auto put = [](uint8_t* to, uint32_t four) { __builtin_memcpy(to, &four, 4); };
  put(p, vgetq_lane_u32(k, 0));
  if (n > 1) put(p + stride, vgetq_lane_u32(k, 1));
  if (n > 2) put(p + 2 * stride, vgetq_lane_u32(k, 2));
  if (n > 3) put(p + 3 * stride, vgetq_lane_u32(k, 3));
}
CADYQ_INLINE void store_code16(int16_t* p, I32 v, const Clamp& c) {
  vst1_s16(p, vmin_s16(vmax_s16(vqmovn_s32(v), c.low16), c.high16));
}

CADYQ_INLINE I16 load16(const int16_t* p) { return vld1q_s16(p); }
CADYQ_INLINE I16 splat16(int16_t v) { return vdupq_n_s16(v); }
// Values of a and b in turn, from the first or second half.
CADYQ_INLINE I16 interleave_low16(I16 a, I16 b) { return vzip1q_s16(a, b); }
CADYQ_INLINE I16 interleave_high16(I16 a, I16 b) { return vzip2q_s16(a, b); }
CADYQ_INLINE I16 upper_product16(I16 a, I16 b) {
  return vshrn_high_n_s32(vshrn_n_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), 16), vmull_high_s16(a, b), 16);
}
// Adds the products of neighboring pairs.
CADYQ_INLINE I32 add_dot16(I32 total, I16 a, I16 b) {
  return vaddq_s32(total, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
}
CADYQ_INLINE void store32(int32_t* p, I32 v) { vst1q_s32(p, v); }
CADYQ_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace cadyq_neon
