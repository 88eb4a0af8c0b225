// Convolutions as one matrix product per image row: 1x1, and 3x3 with a few channels on one side, where Winograd's
// transforms would cost more than they save.
#pragma once
#include "gemm.h"
#include "partials.h"

namespace {

inline int n_channels(const Side& side) {
  int n = 0;
  for (const Lane& lane : side.lanes) n += lane.count;
  return n;
}

// Whether a pixel's channels lie in the order of the convolution's.
inline bool in_order(const Side& side) { return side.lanes[0].step == 1; }

// Copies the 3x3 neighbourhoods of the inner pixels of a row whose pixels have N adjacent floats and nothing between.
template <int N>
inline void patch_inner(const Side& side, const ConvShape& s, int64_t n, int64_t y, float* patch, int64_t pitch) {
  const float* from = side.at(n, y - 1, 0, 0);
  for (int64_t x = 1; x + 1 < s.w; ++x, from += N)
    for (int i = 0; i < 3; ++i)
      __builtin_memcpy(patch + x * pitch + i * 3 * N, from + i * side.sh, 3 * N * sizeof(float));
}

// The neighbourhood of every pixel of an image row: patch[x][tap][channel], with `pitch` floats a pixel. Stores run over
// the end of a pixel by less than one vector.
inline void patch_row(const Source& in, const ConvShape& s, int64_t n, int64_t y, float* patch, int64_t pitch) {
  const int half = s.kernel / 2;
  const Side& side = in.side;
  const int count = side.lanes[0].count;
  const bool dense = s.kernel == 3 && side.lanes.size() == 1 && side.sw == count && !in.mask.data;
  const bool fast = dense && count <= 4 && y > 0 && y + 1 < s.h;
  if (fast) {
    auto inner = count == 1 ? patch_inner<1> : count == 2 ? patch_inner<2> : count == 3 ? patch_inner<3> : patch_inner<4>;
    inner(side, s, n, y, patch, pitch);
  }
  for (int64_t x = 0; x < s.w; ++x) {
    if (fast && x == 1 && s.w > 2) x = s.w - 1;
    float* p = patch + x * pitch;
    for (int dy = -half; dy <= half; ++dy)
      for (int dx = -half; dx <= half; ++dx) {
        const int64_t yy = y + dy, xx = x + dx;
        const bool inside = yy >= 0 && yy < s.h && xx >= 0 && xx < s.w;
        for (size_t g = 0; g < side.lanes.size(); ++g) {
          store(p, inside ? in.read(n, yy, xx, g) : Vec{});
          p += side.lanes[g].count;
        }
      }
  }
}

inline int64_t rows_depth(const ConvShape& s, const Side& in) { return s.kernel * s.kernel * n_channels(in); }
inline int64_t rows_apply_floats(const ConvShape& s, const Side& in, const Side& out) {
  return rows_depth(s, in) * out.padded();
}

inline bool rows_apply(const ConvShape& s, const Source& in, const Filter& f, const Sink& out, const Runtime& rt,
                       float* b) {
  const int64_t depth = rows_depth(s, in.side), n_out = out.side.padded();
  const bool direct = s.kernel == 1 && !in.mask.data && in_order(in.side);
  const bool plain = !out.bias && out.act == Act::none && !out.pre.data && !out.residual.data && in_order(out.side) &&
                     n_channels(out.side) % kWidth == 0;
  const int64_t pitch = depth + kWidth, patch_floats = direct ? 0 : round_up(s.w * pitch, 16);
  const int64_t floats = patch_floats + s.w * kPanel;
  if (!reserve_workers(rt, floats)) return false;
  // b[panel][depth][panel width]
  for (int64_t col = 0; col < n_out; col += kPanel) {
    const int64_t width = min64(kPanel, n_out - col);
    for (int64_t j = 0; j < width; ++j) {
      const Lane& o = out.side.lanes[static_cast<size_t>((col + j) / kWidth)];
      const int l = static_cast<int>(j % kWidth);
      float* p = b + col * depth + j;
      for (int t = 0; t < f.taps; ++t)
        for (const Lane& i : in.side.lanes)
          for (int c = 0; c < i.count; ++c, p += width)
            *p = l < o.count ? f.at(i.channel + c * i.step, o.channel + l * o.step)[f.tap(t)] : 0.0f;
    }
  }
  parallel(rt, s.n * s.h, [&](int64_t item, int worker) {
    float* patch = worker_scratch(rt, worker, floats);
    float* c = patch + patch_floats;
    const int64_t n = item / s.h, y = item % s.h;
    if (!direct) patch_row(in, s, n, y, patch, pitch);
    const float* a = direct ? in.side.at(n, y, 0, 0) : patch;
    for (int64_t col = 0; col < n_out; col += kPanel) {
      const int64_t width = min64(kPanel, n_out - col);
      const int vectors = static_cast<int>(width / kWidth);
      const ptrdiff_t a_row = direct ? in.side.sw : pitch;
      if (plain) {
        gemm<false, false>(s.w, vectors, a, a_row, 1, b + col * depth, width, depth,
                           out.side.at(n, y, 0, static_cast<size_t>(col / kWidth)), out.side.sw);
        continue;
      }
      gemm<false, false>(s.w, vectors, a, a_row, 1, b + col * depth, width, depth, c, width);
      for (int64_t x = 0; x < s.w; ++x)
        for (int64_t l = 0; l < width; l += kWidth)
          out.write(n, y, x, static_cast<size_t>((col + l) / kWidth), load(c + x * width + l));
    }
  });
  return true;
}

// Reads a row of dy into rows[x][out channel] and adds to the sums of the bias and the slopes.
inline void grad_row(const Source& dy, const ConvShape& s, int64_t n, int64_t y, float* rows, float* db,
                     float* dslope) {
  const int64_t n_out = dy.side.padded();
  for (size_t g = 0; g < dy.side.lanes.size(); ++g) {
    const int count = dy.side.lanes[g].count;
    Vec sum = load(db + g * kWidth), slope_sum = dslope ? load(dslope + g * kWidth) : Vec{};
    for (int64_t x = 0; x < s.w; ++x) {
      Vec v = load_n(dy.side.at(n, y, x, g), count);
      if (dy.mask.data) {
        Vec m = load_n(dy.mask.at(n, y, x, g), count);
        if (dslope) slope_sum += m > 0.0f ? Vec{} : v * m;
        v = dy.derivative(v, m, g);
      }
      sum += v;
      if (rows) store(rows + x * n_out + static_cast<int64_t>(g) * kWidth, v);
    }
    store(db + g * kWidth, sum);
    if (dslope) store(dslope + g * kWidth, slope_sum);
  }
}

inline int64_t rows_chunks(const ConvShape& s) { return n_chunks(s.n * s.h, 32); }
inline int64_t rows_grad_floats(const ConvShape& s, const Side& in, const Side& out) {
  return rows_chunks(s) * partial_floats(s.kernel * s.kernel, n_channels(in), out.padded());
}

inline bool rows_grad(const ConvShape& s, const Source& in, const Source& dy, const Gradients& to, const Runtime& rt,
                      float* partial) {
  const int taps = s.kernel * s.kernel, n_in = n_channels(in.side);
  const int64_t depth = rows_depth(s, in.side), n_out = dy.side.padded(), chunks = rows_chunks(s);
  const bool direct = s.kernel == 1;
  const int64_t pitch = depth + kWidth, patch_floats = direct ? 0 : round_up(s.w * pitch, 16);
  const int64_t floats = patch_floats + s.w * n_out;
  if (!reserve_workers(rt, floats)) return false;
  parallel(rt, chunks, [&](int64_t chunk, int worker) {
    float* patch = worker_scratch(rt, worker, floats);
    float* rows = patch + patch_floats;
    float* d = partial + chunk * partial_floats(taps, n_in, n_out);
    float* db = d + depth * n_out;
    for (int64_t i = 0; i < (depth + 2) * n_out; ++i) d[i] = 0.0f;
    const int64_t last = s.n * s.h * (chunk + 1) / chunks;
    for (int64_t row = s.n * s.h * chunk / chunks; row < last; ++row) {
      const int64_t n = row / s.h, y = row % s.h;
      if (!direct) patch_row(in, s, n, y, patch, pitch);
      grad_row(dy, s, n, y, rows, db, to.slopes ? db + n_out : nullptr);
      for (int64_t col = 0; col < n_out; col += kPanel)
        gemm<true, true>(depth, static_cast<int>(min64(kPanel, n_out - col) / kWidth),
                         direct ? in.side.at(n, y, 0, 0) : patch, 1, direct ? in.side.sw : pitch, rows + col, n_out,
                         s.w, d + col, n_out);
    }
  });
  reduce_partials(partial, chunks, taps, n_in, dy.side, static_cast<int64_t>(taps) * n_in,
                  [](int64_t c) { return c; }, to, rt);
  return true;
}

// 3x3 to at most four channels: every pixel's channels times all nine taps, t[pixel][tap][out], then nine shifted sums.
inline int64_t thin_width(const Side& out) { return round_up(9 * n_channels(out), kWidth); }
inline int64_t thin_apply_floats(const Side& in, const Side& out) { return n_channels(in) * thin_width(out); }

inline bool thin_apply(const ConvShape& s, const Source& in, const Filter& f, const Sink& out, const Runtime& rt,
                       float* b) {
  typedef float Vec4 __attribute__((vector_size(16)));
  constexpr int64_t kBand = 24;
  const int64_t depth = n_channels(in.side), n_t = thin_width(out.side);
  const int n_out = n_channels(out.side);
  const bool direct = !in.mask.data && in_order(in.side);
  const int64_t pitch = depth + kWidth, patch_floats = direct ? 0 : round_up(s.w * pitch, 16);
  const int64_t row_floats = (s.w + 2) * n_t + 16, floats = patch_floats + 4 * row_floats;
  if (!reserve_workers(rt, floats)) return false;
  for (int64_t i = 0; i < depth * n_t; ++i) b[i] = 0.0f;
  int64_t k = 0;
  for (const Lane& i : in.side.lanes)
    for (int c = 0; c < i.count; ++c, ++k)
      for (int t = 0; t < 9; ++t)
        for (int o = 0; o < n_out; ++o) b[k * n_t + t * n_out + o] = f.at(i.channel + c * i.step, o)[f.tap(t)];
  ConvShape point = s;
  point.kernel = 1;
  const int64_t bands = ceil_div(s.h, kBand);
  parallel(rt, s.n * bands, [&](int64_t item, int worker) {
    float* patch = worker_scratch(rt, worker, floats);
    float* ring = patch + patch_floats;  // three rows and one of zeros, each with a pixel of zeros at both ends
    for (int64_t i = 0; i < 4 * row_floats; ++i) ring[i] = 0.0f;
    const int64_t n = item / bands, first = item % bands * kBand, last = min64(s.h, first + kBand);
    auto row_at = [&](int64_t y) { return ring + (y < 0 || y >= s.h ? 3 : y % 3) * row_floats; };
    auto product = [&](int64_t y) {
      if (y < 0 || y >= s.h) return;
      if (!direct) patch_row(in, point, n, y, patch, pitch);
      for (int64_t col = 0; col < n_t; col += kPanel)
        gemm<false, false>(s.w, static_cast<int>(min64(kPanel, n_t - col) / kWidth),
                           direct ? in.side.at(n, y, 0, 0) : patch, direct ? in.side.sw : pitch, 1, b + col, n_t,
                           depth, row_at(y) + n_t + col, n_t);
    };
    product(first - 1);
    product(first);
    for (int64_t y = first; y < last; ++y) {
      product(y + 1);
      for (int64_t x = 0; x < s.w; ++x) {
        Vec4 sum{};
        for (int ky = 0; ky < 3; ++ky) {
          const float* t = row_at(y + ky - 1) + x * n_t + 3 * ky * n_out;
          for (int kx = 0; kx < 3; ++kx) {
            Vec4 v;
            __builtin_memcpy(&v, t + kx * (n_t + n_out), sizeof v);
            sum += v;
          }
        }
        Vec z{};
        __builtin_memcpy(&z, &sum, sizeof sum);
        out.write(n, y, x, 0, z);
      }
    }
  });
  return true;
}

inline int64_t thin_partial_floats(const Side& in, const Side& out) {
  return n_channels(in) * thin_width(out) + 2 * kWidth;
}
inline int64_t thin_grad_floats(const ConvShape& s, const Side& in, const Side& out) {
  return rows_chunks(s) * thin_partial_floats(in, out);
}

inline bool thin_grad(const ConvShape& s, const Source& in, const Source& dy, const Gradients& to, const Runtime& rt,
                      float* partial) {
  const int n_in = n_channels(in.side), n_out = n_channels(dy.side);
  const int64_t n_t = thin_width(dy.side), chunks = rows_chunks(s);
  const int64_t one = thin_partial_floats(in.side, dy.side), sums = n_in * n_t;
  const int64_t pitch = n_t + kWidth, floats = s.w * pitch;
  if (!reserve_workers(rt, floats)) return false;
  parallel(rt, chunks, [&](int64_t chunk, int worker) {
    float* patch = worker_scratch(rt, worker, floats);
    float* d = partial + chunk * one;
    for (int64_t i = 0; i < one; ++i) d[i] = 0.0f;
    const int64_t last = s.n * s.h * (chunk + 1) / chunks;
    for (int64_t row = s.n * s.h * chunk / chunks; row < last; ++row) {
      const int64_t n = row / s.h, y = row % s.h;
      patch_row(dy, s, n, y, patch, pitch);
      grad_row(dy, s, n, y, nullptr, d + sums, to.slopes ? d + sums + kWidth : nullptr);
      for (int64_t col = 0; col < n_t; col += kPanel)
        gemm<true, true>(n_in, static_cast<int>(min64(kPanel, n_t - col) / kWidth), in.side.at(n, y, 0, 0), 1,
                         in.side.sw, patch + col, pitch, s.w, d + col, n_t);
    }
  });
  auto total = [&](int64_t offset) {
    float v = 0.0f;
    for (int64_t k = 0; k < chunks; ++k) v += partial[k * one + offset];
    return v;
  };
  for (int o = 0; o < n_out; ++o) {
    for (int c = 0; c < n_in; ++c)
      // The gradient that x's pixel has part in lies at the opposite neighbour.
      for (int t = 0; t < 9; ++t) to.weight[(o * n_in + c) * 9 + t] = total(c * n_t + (8 - t) * n_out + o);
    if (to.bias) to.bias[o] = total(sums + o);
    if (to.slopes) to.slopes[dy.side.lanes[0].image_channel + o] += total(sums + kWidth + o);
  }
  return true;
}

}  // namespace
