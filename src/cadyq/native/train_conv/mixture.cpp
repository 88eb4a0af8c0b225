// The candidate mixture of one instruction set (CADYQ_ISA); compiled once for each, without fused multiply-adds.
//   u = clip(x / s, lo * a, a) / a,   lo = -1 signed, 0 unsigned
//   Q(x) = round_half_even(u * q) / q * a * s
#include <cmath>

#include "layout.h"

namespace {

using cadyq::Mixture;

// Exact for |v| < 2^22: the sum has no bits left below one.
inline Vec round_half_even(Vec v) {
  const Vec magic = splat(12582912.0f);
  return (v + magic) - magic;
}

struct Quantized {
  Vec y;       // Q(x) / s / a
  Vec u;       // clipped x / s / a
  Vec inside;  // 1 where the clip has a slope
  Vec sign;    // slope of the clip's bound in a: -1, 0 or 1
};

inline Quantized quantize(Vec v, Vec a, Vec q, Vec low) {
  const Vec one = splat(1.0f), zero = Vec{};
  Quantized r;
  const Vec bottom = low * a;
  Vec clipped = v < bottom ? bottom : v;
  clipped = clipped > a ? a : clipped;
  r.u = clipped / a;
  r.y = round_half_even(r.u * q) / q;
  r.inside = v > bottom ? (v < a ? one : zero) : zero;
  r.sign = v >= a ? one : (v <= bottom ? low : zero);
  return r;
}

inline float sum(Vec v) {
  float total = 0.0f;
  for (int l = 0; l < kWidth; ++l) total += v[l];
  return total;
}

inline int64_t first_row(int64_t rows, int64_t part, int64_t parts) { return rows * part / parts; }
// Parts of a sample, fixed by its size so that sums do not depend on the number of threads.
inline int64_t n_parts(const Mixture& m) { return max64(1, min64(8, m.h / 16)); }

bool forward(const Mixture& m, const Image& x, const int32_t* chosen, const Image& y, const Runtime& rt) {
  const int64_t parts = n_parts(m);
  const Vec low = splat(m.is_signed ? -1.0f : 0.0f);
  parallel(rt, m.n * parts, [&](int64_t item, int) {
    const int64_t n = item / parts, part = item % parts;
    const Vec a = splat(m.clip[chosen[n]]), q = splat(m.levels[chosen[n]]);
    for (int64_t row = first_row(m.h, part, parts); row < first_row(m.h, part + 1, parts); ++row)
      for (int64_t col = 0; col < m.w; ++col) {
        const float* from = x.data + n * x.stride_n + row * x.stride_h + col * x.stride_w;
        float* to = y.data + n * y.stride_n + row * y.stride_h + col * y.stride_w;
        for (int c = 0; c < m.c; c += kWidth) {
          const int count = static_cast<int>(min64(kWidth, m.c - c));
          const Vec s = load_n(m.scale + c, count);
          const Quantized r = quantize(load_n(from + c, count) / s, a, q, low);
          store_n(to + c, r.y * a * s, count);
        }
      }
  });
  return true;
}

bool backward(const Mixture& m, const Image& x, const Image& dy, const float* prob, const Image& dx, float* dprob,
              float* dclip, const Runtime& rt) {
  const int64_t parts = n_parts(m), k2 = 2 * m.k;
  float* sums = rt.scratch(rt.self, -1, static_cast<size_t>(m.n * parts * k2));
  if (!sums || !reserve_workers(rt, k2 * kWidth)) return false;
  const Vec low = splat(m.is_signed ? -1.0f : 0.0f);
  parallel(rt, m.n * parts, [&](int64_t item, int worker) {
    const int64_t n = item / parts, part = item % parts;
    float* acc = worker_scratch(rt, worker, k2 * kWidth);  // one row of pixels at a time, to keep sums short
    for (int64_t k = 0; k < k2; ++k) sums[item * k2 + k] = 0.0f;
    for (int64_t row = first_row(m.h, part, parts); row < first_row(m.h, part + 1, parts); ++row) {
      for (int64_t i = 0; i < k2 * kWidth; ++i) acc[i] = 0.0f;
      for (int c = 0; c < m.c; c += kWidth) {
        const int count = static_cast<int>(min64(kWidth, m.c - c));
        Vec s = load_n(m.scale + c, count);
        for (int l = count; l < kWidth; ++l) s[l] = 1.0f;
        for (int64_t col = 0; col < m.w; ++col) {
          const Vec v = load_n(x.data + n * x.stride_n + row * x.stride_h + col * x.stride_w + c, count) / s;
          const Vec g = load_n(dy.data + n * dy.stride_n + row * dy.stride_h + col * dy.stride_w + c, count);
          const Vec gs = g * s;
          Vec weight{};
          for (int k = 0; k < m.k; ++k) {
            const Vec a = splat(m.clip[k]);
            const Quantized r = quantize(v, a, splat(m.levels[k]), low);
            weight += r.inside * splat(prob[n * m.k + k]);
            float* at = acc + 2 * k * kWidth;
            store(at, load(at) + g * (r.y * a * s));
            const Vec slope = r.inside > 0.0f ? r.y - r.u : r.sign;
            store(at + kWidth, load(at + kWidth) + gs * slope);
          }
          store_n(dx.data + n * dx.stride_n + row * dx.stride_h + col * dx.stride_w + c, g * weight, count);
        }
      }
      for (int64_t k = 0; k < k2; ++k) sums[item * k2 + k] += sum(load(acc + k * kWidth));
    }
  });
  for (int k = 0; k < m.k; ++k) dclip[k] = 0.0f;
  for (int64_t n = 0; n < m.n; ++n)
    for (int k = 0; k < m.k; ++k) {
      float dp = 0.0f, da = 0.0f;
      for (int64_t part = 0; part < parts; ++part) {
        dp += sums[(n * parts + part) * k2 + 2 * k];
        da += sums[(n * parts + part) * k2 + 2 * k + 1];
      }
      dprob[n * m.k + k] = dp;
      dclip[k] += prob[n * m.k + k] * da;
    }
  return true;
}

// Sums of differences to the sample's first pixel: they are small where the deviation is, so that nothing cancels.
bool deviation(const Mixture& m, const Image& x, float* result, const Runtime& rt) {
  const int64_t parts = n_parts(m), width = round_up(m.c, kWidth);
  float* sums = rt.scratch(rt.self, -1, static_cast<size_t>(m.n * parts * 2 * width));
  if (!sums) return false;
  parallel(rt, m.n * parts, [&](int64_t item, int) {
    const int64_t n = item / parts, part = item % parts;
    const float* sample = x.data + n * x.stride_n;
    for (int c = 0; c < m.c; c += kWidth) {
      const int count = static_cast<int>(min64(kWidth, m.c - c));
      const Vec origin = load_n(sample + c, count);
      Vec sum{}, squares{};
      for (int64_t row = first_row(m.h, part, parts); row < first_row(m.h, part + 1, parts); ++row) {
        Vec s{}, q{};  // one row of pixels at a time, to keep sums short
        for (int64_t col = 0; col < m.w; ++col) {
          const Vec d = load_n(sample + row * x.stride_h + col * x.stride_w + c, count) - origin;
          s += d;
          q += d * d;
        }
        sum += s;
        squares += q;
      }
      store(sums + item * 2 * width + c, sum);
      store(sums + item * 2 * width + width + c, squares);
    }
  });
  const double pixels = static_cast<double>(m.h) * static_cast<double>(m.w);
  for (int64_t n = 0; n < m.n; ++n)
    for (int c = 0; c < m.c; ++c) {
      double s = 0, q = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const float* from = sums + (n * parts + part) * 2 * width + c;
        s += from[0];
        q += from[width];
      }
      const double spread = q - s * s / pixels;
      result[n * m.c + c] = pixels > 1 && !(spread < 0) ? static_cast<float>(std::sqrt(spread / (pixels - 1))) : 0.0f;
    }
  return true;
}

}  // namespace

#define CADYQ_JOIN_(a, b) a##b
#define CADYQ_JOIN(a, b) CADYQ_JOIN_(a, b)

namespace cadyq {
extern const MixtureKernels CADYQ_JOIN(mixture_kernels_, CADYQ_ISA);
const MixtureKernels CADYQ_JOIN(mixture_kernels_, CADYQ_ISA) = {forward, backward, deviation};
}  // namespace cadyq
