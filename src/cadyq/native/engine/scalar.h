// One value at a time: what the portable kernels are made of, and the ends of vectors elsewhere.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels.h"

// Conversion of an out-of-range float is undefined, so the clamp comes first; the bounds are integers.
static inline int32_t cadyq_round(float v, float low, float high) {
  v = v < low ? low : v > high ? high : v;
  return static_cast<int32_t>(std::nearbyint(v));
}

static inline void cadyq_quantize_one(float value, void* dst, size_t at, float multiplier, const CadyqQuantizer& q,
                                      int32_t store) {
  const int32_t code = cadyq_round(value * multiplier, static_cast<float>(q.low), static_cast<float>(q.high));
  if (store == CADYQ_CODE8)
    static_cast<uint8_t*>(dst)[at] = static_cast<uint8_t>(static_cast<uint8_t>(code) ^ q.flip);
  else
    static_cast<int16_t*>(dst)[at] = static_cast<int16_t>(code);
}

static inline int16_t cadyq_snap_one(float value, int c, const CadyqSnap& s) {
  if (s.multiplier)
    value = static_cast<float>(
        cadyq_round(value * s.multiplier[c], static_cast<float>(s.low), static_cast<float>(s.high)));
  return static_cast<int16_t>(cadyq_round(value * s.ratio[c], -32768.f, 32767.f));
}
