// 3x3 convolutions by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016): 36 instead of 144 products per 4x4 outputs.
//   y  = A^T [ (G w G^T) . (B^T x B) ] A            forward, and the input gradient with turned weights
//   dw = G^T [ sum (B^T x B) . (A dy A^T) ] G       weight gradient
#pragma once
#include "gemm.h"
#include "partials.h"

namespace {

constexpr int kPlanes = 36;

// o = B^T d
inline void bt(const Vec d[6], Vec o[6]) {
  Vec a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1], c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
  o[0] = 4.0f * d[0] + (d[4] - 5.0f * d[2]);
  o[1] = a + b;
  o[2] = a - b;
  o[3] = c + e;
  o[4] = c - e;
  o[5] = 4.0f * d[1] + (d[5] - 5.0f * d[3]);
}
// o = A^T m
inline void at(const Vec m[6], Vec o[4]) {
  Vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
  o[0] = m[0] + a + c;
  o[1] = b + 2.0f * d;
  o[2] = a + 4.0f * c;
  o[3] = b + 8.0f * d + m[5];
}
// o = A y
inline void aa(const Vec y[4], Vec o[6]) {
  Vec a = y[0] + y[2], b = y[1] + y[3], c = y[0] + 4.0f * y[2], d = 2.0f * y[1] + 8.0f * y[3];
  o[0] = y[0];
  o[1] = a + b;
  o[2] = a - b;
  o[3] = c + d;
  o[4] = c - d;
  o[5] = y[3];
}
// o = G w
inline void gw(const Vec w[3], Vec o[6]) {
  Vec a = (w[0] + w[2]) * (-1.0f / 6), b = w[1] * (-1.0f / 6);
  Vec c = w[0] * (1.0f / 24) + w[2] * (1.0f / 6), d = w[1] * (1.0f / 12);
  o[0] = w[0] * 0.25f;
  o[1] = a + b;
  o[2] = a - b;
  o[3] = c + d;
  o[4] = c - d;
  o[5] = w[2];
}
// o = G^T m
inline void gt(const Vec m[6], Vec o[3]) {
  Vec a = m[1] + m[2], c = m[3] + m[4];
  o[0] = m[0] * 0.25f - a * (1.0f / 6) + c * (1.0f / 24);
  o[1] = (m[2] - m[1]) * (1.0f / 6) + (m[3] - m[4]) * (1.0f / 12);
  o[2] = m[5] - a * (1.0f / 6) + c * (1.0f / 6);
}

struct Tiles {
  int64_t rows, cols, total;
  explicit Tiles(const ConvShape& s) : rows(ceil_div(s.h, 4)), cols(ceil_div(s.w, 4)), total(s.n * rows * cols) {}
};

// Calls f(n, tile_row, first_tile_col, count, index) for each stretch of tiles [begin, end) that lies in one row.
template <class F>
inline void for_stretches(const Tiles& tiles, int64_t begin, int64_t end, const F& f) {
  for (int64_t t = begin; t < end;) {
    int64_t col = t % tiles.cols, row = t / tiles.cols;
    int64_t count = min64(tiles.cols - col, end - t);
    f(row / tiles.rows, row % tiles.rows, col, count, t - begin);
    t += count;
  }
}

// The column x of a tile row, rows top .. top+5, transformed. Zero outside of the image.
template <bool kMask, bool kInner>
inline void column(const Source& in, const ConvShape& s, int64_t n, int64_t top, int64_t x, size_t lane, Vec o[6]) {
  Vec d[6];
  if (x < 0 || x >= s.w) {
    for (int i = 0; i < 6; ++i) o[i] = Vec{};
    return;
  }
  if (kInner) {
    const float* p = in.side.at(n, top, x, lane);
    for (int i = 0; i < 6; ++i) d[i] = load(p + i * in.side.sh);
    if (kMask) {
      const float* m = in.mask.at(n, top, x, lane);
      for (int i = 0; i < 6; ++i) d[i] = in.derivative(d[i], load(m + i * in.mask.sh), lane);
    }
  } else {
    for (int i = 0; i < 6; ++i) d[i] = top + i >= 0 && top + i < s.h ? in.read(n, top + i, x, lane) : Vec{};
  }
  bt(d, o);
}

// B^T d B of one tile and lane. `carry` keeps the last two transformed columns, which the right neighbour shares.
template <bool kMask, bool kInner>
inline void tile_in(const Source& in, const ConvShape& s, int64_t n, int64_t top, int64_t left, size_t lane, bool first,
                    float* carry, float* v, int64_t v_plane) {
  Vec t[6][6];
  if (first) {
    column<kMask, kInner>(in, s, n, top, left, lane, t[0]);
    column<kMask, kInner>(in, s, n, top, left + 1, lane, t[1]);
  } else {
    for (int i = 0; i < 6; ++i) t[0][i] = load(carry + i * kWidth), t[1][i] = load(carry + (6 + i) * kWidth);
  }
  for (int j = 2; j < 6; ++j) column<kMask, kInner>(in, s, n, top, left + j, lane, t[j]);
  for (int i = 0; i < 6; ++i) store(carry + i * kWidth, t[4][i]), store(carry + (6 + i) * kWidth, t[5][i]);
  for (int i = 0; i < 6; ++i) {
    Vec row[6] = {t[0][i], t[1][i], t[2][i], t[3][i], t[4][i], t[5][i]}, o[6];
    bt(row, o);
    for (int j = 0; j < 6; ++j) store(v + (i * 6 + j) * v_plane, o[j]);
  }
}

// Asks for the pixels of [y, y + rows) x [x, x + 4) of one lane; the strides are too long for hardware to guess.
inline void prefetch(const Side& side, const ConvShape& s, int64_t n, int64_t y, int64_t x, int64_t rows, size_t lane) {
  const int64_t top = max64(y, 0), bottom = min64(y + rows, s.h), right = min64(x + 4, s.w);
  for (int64_t i = top; i < bottom; ++i)
    for (int64_t j = max64(x, 0); j < right; ++j) __builtin_prefetch(side.at(n, i, j, lane));
}

constexpr int64_t kCarry = 12;  // floats of carry per channel

inline void transform_in(const Source& in, const ConvShape& s, const Tiles& tiles, int64_t begin, int64_t end, float* v,
                         int64_t v_tile, int64_t v_plane, float* carry) {
  for_stretches(tiles, begin, end, [&](int64_t n, int64_t row, int64_t col, int64_t count, int64_t index) {
    const bool inner_rows = row > 0 && 4 * row + 5 <= s.h;
    const int64_t top = 4 * row - 1;
    for (int64_t c = 0; c < count; ++c)
      for (size_t lane = 0; lane < in.side.lanes.size(); ++lane) {
        const int64_t left = 4 * (col + c) - 1, at = static_cast<int64_t>(lane) * kWidth;
        if (c + 1 < count) {
          prefetch(in.side, s, n, top, left + 6, 6, lane);
          if (in.mask.data) prefetch(in.mask, s, n, top, left + 6, 6, lane);
        }
        const bool inner = inner_rows && in.side.lanes[lane].count == kWidth;
        auto tile = in.mask.data ? (inner ? tile_in<true, true> : tile_in<true, false>)
                                 : (inner ? tile_in<false, true> : tile_in<false, false>);
        tile(in, s, n, top, left, lane, c == 0, carry + kCarry * at, v + (index + c) * v_tile + at, v_plane);
      }
  });
}

// u[panel][plane][in][panel width] = G w G^T
inline void transform_weights(const Filter& f, const Side& in, const Side& out, float* u, const Runtime& rt) {
  int64_t n_in = in.padded();
  parallel(rt, static_cast<int64_t>(out.lanes.size()), [&](int64_t g, int) {
    int64_t panel = g / 2;
    int64_t width = min64(kPanel, out.padded() - panel * kPanel);
    float* base = u + panel * kPanel * kPlanes * n_in + (g % 2) * kWidth;
    const Lane& o = out.lanes[static_cast<size_t>(g)];
    for (int64_t c = 0; c < n_in; ++c) {
      const Lane& i = in.lanes[static_cast<size_t>(c / kWidth)];
      int l = static_cast<int>(c % kWidth);
      float taps[9][kWidth] = {};
      if (l < i.count)
        for (int k = 0; k < o.count; ++k) {
          const float* w = f.at(i.channel + l * i.step, o.channel + k * o.step);
          for (int t = 0; t < 9; ++t) taps[t][k] = w[f.tap(t)];
        }
      Vec half[3][6];
      for (int j = 0; j < 3; ++j) {
        Vec w[3] = {load(taps[j]), load(taps[3 + j]), load(taps[6 + j])};
        gw(w, half[j]);
      }
      for (int r = 0; r < 6; ++r) {
        Vec w[3] = {half[0][r], half[1][r], half[2][r]}, o6[6];
        gw(w, o6);
        for (int j = 0; j < 6; ++j) store(base + ((r * 6 + j) * n_in + c) * width, o6[j]);
      }
    }
  });
}

// A^T m A of one tile and lane, handed to the sink.
inline void transform_out(const Sink& out, const ConvShape& s, int64_t n, int64_t y0, int64_t x0, size_t lane,
                          const float* m, int64_t m_plane) {
  Vec half[6][4];
  for (int j = 0; j < 6; ++j) {
    Vec c[6];
    for (int i = 0; i < 6; ++i) c[i] = load(m + (i * 6 + j) * m_plane);
    at(c, half[j]);
  }
  int64_t h = min64(4, s.h - y0), w = min64(4, s.w - x0);
  for (int i = 0; i < h; ++i) {
    Vec row[6] = {half[0][i], half[1][i], half[2][i], half[3][i], half[4][i], half[5][i]}, o[4];
    at(row, o);
    if (w == 4 && out.side.lanes[lane].count == kWidth)
      out.write_four(n, y0 + i, x0, lane, o);
    else
      for (int j = 0; j < w; ++j) out.write(n, y0 + i, x0 + j, lane, o[j]);
  }
}

// Planes lie a little apart, against conflicts of equal addresses in a cache.
constexpr int64_t kPlanePad = 16;

// Tiles per block: a block's planes take about 400 KB of the second cache level and leave room for the weights.
inline int64_t block_tiles(int64_t channels) {
  int64_t fit = 100000 / (kPlanes * channels) / kRows;
  return kRows * max64(1, min64(fit, 96 / kRows));
}

inline int64_t winograd_apply_floats(const Side& in, const Side& out) { return kPlanes * in.padded() * out.padded(); }

// out = conv(in); u: winograd_apply_floats() of scratch.
inline bool winograd_apply(const ConvShape& s, const Source& in, const Filter& filter, const Sink& out,
                           const Runtime& rt, float* u) {
  const int64_t n_in = in.side.padded(), n_out = out.side.padded();
  const Tiles tiles(s);
  const int64_t block = block_tiles(n_in + kPanel);
  const int64_t v_plane = block * n_in + kPlanePad, m_plane = block * kPanel + kPlanePad;
  const int64_t floats = kPlanes * (v_plane + m_plane) + kCarry * n_in;
  if (!reserve_workers(rt, floats)) return false;
  transform_weights(filter, in.side, out.side, u, rt);
  parallel(rt, ceil_div(tiles.total, block), [&](int64_t item, int worker) {
    float* v = worker_scratch(rt, worker, floats);
    float* m = v + kPlanes * v_plane;
    int64_t begin = item * block, end = min64(tiles.total, begin + block);
    transform_in(in, s, tiles, begin, end, v, n_in, v_plane, m + kPlanes * m_plane);
    for (int64_t col = 0; col < n_out; col += kPanel) {
      int64_t width = min64(kPanel, n_out - col);
      const float* panel = u + col * kPlanes * n_in;
      for (int k = 0; k < kPlanes; ++k)
        gemm<false, false>(end - begin, static_cast<int>(width / kWidth), v + k * v_plane, n_in, 1,
                           panel + k * n_in * width, width, n_in, m + k * m_plane, width);
      for_stretches(tiles, begin, end, [&](int64_t n, int64_t row, int64_t tile_col, int64_t count, int64_t index) {
        for (int64_t t = 0; t < count; ++t)
          for (int64_t l = 0; l < width; l += kWidth) {
            const size_t lane = static_cast<size_t>((col + l) / kWidth);
            if (t + 1 < count) {
              prefetch(out.side, s, n, 4 * row, 4 * (tile_col + t + 1), 4, lane);
              if (out.residual.data) prefetch(out.residual, s, n, 4 * row, 4 * (tile_col + t + 1), 4, lane);
            }
            transform_out(out, s, n, 4 * row, 4 * (tile_col + t), lane, m + (index + t) * width + l, m_plane);
          }
      });
    }
  });
  return true;
}

// A dy A^T of one tile and lane; adds to the sums of dy and of the slopes' gradient.
inline void transform_grad(const Source& dy, const ConvShape& s, int64_t n, int64_t y0, int64_t x0, size_t lane,
                           float* z, int64_t z_plane, float* db, float* dslope) {
  Vec d[4][4], sum = load(db), slope_sum = dslope ? load(dslope) : Vec{};
  const int64_t h = min64(4, s.h - y0), w = min64(4, s.w - x0);
  const int count = dy.side.lanes[lane].count;
  if (h == 4 && w == 4 && count == kWidth) {
    const float* p = dy.side.at(n, y0, x0, lane);
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) d[i][j] = load(p + i * dy.side.sh + j * dy.side.sw);
    if (dy.mask.data) {
      const float* q = dy.mask.at(n, y0, x0, lane);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
          const Vec m = load(q + i * dy.mask.sh + j * dy.mask.sw);
          if (dslope) slope_sum += m > 0.0f ? Vec{} : d[i][j] * m;
          d[i][j] = dy.derivative(d[i][j], m, lane);
        }
    }
  } else {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        d[i][j] = Vec{};
        if (i >= h || j >= w) continue;
        if (dslope) {
          const Vec m = load_n(dy.mask.at(n, y0 + i, x0 + j, lane), count);
          slope_sum += m > 0.0f ? Vec{} : load_n(dy.side.at(n, y0 + i, x0 + j, lane), count) * m;
        }
        d[i][j] = dy.read(n, y0 + i, x0 + j, lane);
      }
  }
  for (int i = 0; i < 4; ++i) sum += (d[i][0] + d[i][1]) + (d[i][2] + d[i][3]);
  store(db, sum);
  if (dslope) store(dslope, slope_sum);
  Vec half[4][6];
  for (int j = 0; j < 4; ++j) {
    Vec c[4] = {d[0][j], d[1][j], d[2][j], d[3][j]};
    aa(c, half[j]);
  }
  for (int i = 0; i < 6; ++i) {
    Vec row[4] = {half[0][i], half[1][i], half[2][i], half[3][i]}, o[6];
    aa(row, o);
    for (int j = 0; j < 6; ++j) store(z + (i * 6 + j) * z_plane, o[j]);
  }
}

inline int64_t winograd_chunks(const ConvShape& s) { return n_chunks(Tiles(s).total, 144); }

inline int64_t winograd_grad_floats(const ConvShape& s, const Side& in, const Side& out) {
  return winograd_chunks(s) * partial_floats(9, in.padded(), out.padded());
}

// partial: winograd_grad_floats() of scratch.
inline bool winograd_grad(const ConvShape& s, const Source& in, const Source& dy, const Gradients& to,
                          const Runtime& rt, float* partial) {
  const int64_t n_in = in.side.padded(), n_out = dy.side.padded(), chunks = winograd_chunks(s);
  const Tiles tiles(s);
  const int64_t block = max64(16, min64(48, 110000 / (kPlanes * n_in) / 4 * 4));
  const int64_t v_plane = block * n_in + kPlanePad, z_plane = block * kPanel + kPlanePad;
  const int64_t d_plane = n_in * kPanel + kPlanePad, d_panel = kPlanes * d_plane;
  const int64_t floats = kPlanes * (v_plane + z_plane) + d_panel * ceil_div(n_out, kPanel) + kCarry * n_in;
  if (!reserve_workers(rt, floats)) return false;
  parallel(rt, chunks, [&](int64_t chunk, int worker) {
    float* v = worker_scratch(rt, worker, floats);
    float* z = v + kPlanes * v_plane;
    float* carry = z + kPlanes * z_plane;
    float* d = carry + kCarry * n_in;
    float* sums = partial + chunk * partial_floats(9, n_in, n_out);
    float* db = sums + 9 * n_in * n_out;
    float* dslope = db + n_out;
    for (int64_t i = 0; i < 2 * n_out; ++i) db[i] = 0.0f;
    const int64_t first = tiles.total * chunk / chunks, last = tiles.total * (chunk + 1) / chunks;
    for (int64_t begin = first; begin < last; begin += block) {
      const int64_t end = min64(last, begin + block);
      transform_in(in, s, tiles, begin, end, v, n_in, v_plane, carry);
      for (int64_t col = 0; col < n_out; col += kPanel) {
        const int64_t width = min64(kPanel, n_out - col);
        for_stretches(tiles, begin, end, [&](int64_t n, int64_t row, int64_t tile_col, int64_t count, int64_t index) {
          for (int64_t t = 0; t < count; ++t)
            for (int64_t l = col; l < col + width; l += kWidth) {
              const size_t lane = static_cast<size_t>(l / kWidth);
              if (t + 1 < count) {
                prefetch(dy.side, s, n, 4 * row, 4 * (tile_col + t + 1), 4, lane);
                if (dy.mask.data) prefetch(dy.mask, s, n, 4 * row, 4 * (tile_col + t + 1), 4, lane);
              }
              transform_grad(dy, s, n, 4 * row, 4 * (tile_col + t), lane, z + (index + t) * width + l - col, z_plane,
                             db + l, to.slopes ? dslope + l : nullptr);
            }
        });
        for (int k = 0; k < kPlanes; ++k) {
          float* dk = d + col / kPanel * d_panel + k * d_plane;
          auto product = begin == first ? gemm<false, true> : gemm<true, true>;
          product(n_in, static_cast<int>(width / kWidth), v + k * v_plane, 1, n_in, z + k * z_plane, width,
                  end - begin, dk, width);
        }
      }
    }
    for (int64_t l = 0; l < n_out; l += kWidth) {
      const int64_t col = l / kPanel * kPanel, width = min64(kPanel, n_out - col);
      for (int64_t c = 0; c < n_in; ++c) {
        const float* m = d + col / kPanel * d_panel + c * width + l - col;
        Vec half[6][3];
        for (int j = 0; j < 6; ++j) {
          Vec column[6];
          for (int i = 0; i < 6; ++i) column[i] = load(m + (i * 6 + j) * d_plane);
          gt(column, half[j]);
        }
        for (int i = 0; i < 3; ++i) {
          Vec row[6] = {half[0][i], half[1][i], half[2][i], half[3][i], half[4][i], half[5][i]}, o[3];
          gt(row, o);
          for (int j = 0; j < 3; ++j) store(sums + ((i * 3 + j) * n_in + c) * n_out + l, o[j]);
        }
      }
    }
  });
  const Side& x = in.side;
  auto channel = [&](int64_t c) -> int64_t {
    const Lane& lane = x.lanes[static_cast<size_t>(c / kWidth)];
    return c % kWidth < lane.count ? lane.channel + c % kWidth * lane.step : -1;
  };
  int64_t out_stride = 9 * (s.ci / s.groups);
  reduce_partials(partial, chunks, 9, n_in, dy.side, out_stride, channel, to, rt);
  return true;
}

}  // namespace
