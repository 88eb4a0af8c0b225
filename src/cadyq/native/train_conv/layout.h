// How the kernels see images: vectors of adjacent channels ("lanes"), PixelShuffle as a view, and what happens to a
// value on its way in (the activation's derivative) or out (bias, activation, residual).
#pragma once
#include <vector>

#include "abi.h"
#include "vec.h"

namespace {

using cadyq::Act;
using cadyq::Activation;
using cadyq::ConvShape;
using cadyq::Image;
using cadyq::Runtime;

// One vector of a pixel. Element l is channel `channel + l * step` of the convolution (within its group) and channel
// `image_channel + l` of the image; they differ under PixelShuffle.
struct Lane {
  int64_t offset;
  int count, channel, step, image_channel;
};

// One side of a convolution, one group's channels: pixel (n, y, x) lane g is at data + n*sn + y*sh + x*sw + offset.
struct Side {
  float* data = nullptr;
  int64_t sn = 0, sh = 0, sw = 0;
  std::vector<Lane> lanes;

  int64_t padded() const { return static_cast<int64_t>(lanes.size()) * kWidth; }
  float* at(int64_t n, int64_t y, int64_t x, size_t lane) const {
    return data + n * sn + y * sh + x * sw + lanes[lane].offset;
  }
};

// Channels [first, first + count) of the convolution in an image that a PixelShuffle(shuffle) wrote.
inline Side make_side(const Image* image, int first, int count, int shuffle) {
  Side side;
  if (!image) return side;
  int area = shuffle * shuffle;
  side.data = image->data + first / area;
  side.sn = image->stride_n;
  side.sh = image->stride_h * shuffle;
  side.sw = image->stride_w * shuffle;
  for (int i = 0; i < shuffle; ++i)
    for (int j = 0; j < shuffle; ++j)
      for (int c = 0; c < count / area; c += kWidth)
        side.lanes.push_back({i * image->stride_h + j * image->stride_w + c,
                              static_cast<int>(min64(kWidth, count / area - c)), c * area + i * shuffle + j, area,
                              first / area + c});
  return side;
}

// A group's weights (out, in, taps) as an operator from `in` to `out`; the input gradient swaps the two and turns the
// filter by 180 degrees.
struct Filter {
  const float* weight;
  int64_t in_stride, out_stride;
  int taps;
  bool turned;

  const float* at(int64_t in, int64_t out) const { return weight + in * in_stride + out * out_stride; }
  int tap(int t) const { return turned ? taps - 1 - t : t; }
};

// Reads dy times the activation's derivative; a plain read without a mask.
struct Source {
  Side side, mask;
  Act act = Act::none;
  const float* slopes = nullptr;  // one vector per lane

  Vec derivative(Vec g, Vec m, size_t lane) const {
    if (act == Act::relu) return m > 0.0f ? g : Vec{};
    return m > 0.0f ? g : g * load(slopes + lane * kWidth);
  }
  Vec read(int64_t n, int64_t y, int64_t x, size_t lane) const {
    Vec g = load_n(side.at(n, y, x, lane), side.lanes[lane].count);
    if (!mask.data) return g;
    return derivative(g, load_n(mask.at(n, y, x, lane), mask.lanes[lane].count), lane);
  }
};

// Writes act(z + bias) + residual and, where asked for, z + bias.
struct Sink {
  Side side, pre, residual;
  Act act = Act::none;
  const float* bias = nullptr;    // one vector per lane, or null
  const float* slopes = nullptr;  // one vector per lane

  void write(int64_t n, int64_t y, int64_t x, size_t lane, Vec z) const {
    int count = side.lanes[lane].count;
    if (bias) z += load(bias + lane * kWidth);
    if (pre.data) store_n(pre.at(n, y, x, lane), z, count);
    if (act == Act::relu) z = z < 0.0f ? Vec{} : z;  // this way round a NaN stays one
    if (act > Act::relu) z = z > 0.0f ? z : z * load(slopes + lane * kWidth);
    if (residual.data) z += load_n(residual.at(n, y, x, lane), count);
    store_n(side.at(n, y, x, lane), z, count);
  }

  // The same for four neighbours and a whole vector of channels, with addresses and decisions taken once.
  void write_four(int64_t n, int64_t y, int64_t x, size_t lane, Vec z[4]) const {
    if (bias) {
      const Vec b = load(bias + lane * kWidth);
      for (int j = 0; j < 4; ++j) z[j] += b;
    }
    if (pre.data) {
      float* p = pre.at(n, y, x, lane);
      for (int j = 0; j < 4; ++j) store(p + j * pre.sw, z[j]);
    }
    if (act == Act::relu) {
      for (int j = 0; j < 4; ++j) z[j] = z[j] < 0.0f ? Vec{} : z[j];
    } else if (act != Act::none) {
      const Vec slope = load(slopes + lane * kWidth);
      for (int j = 0; j < 4; ++j) z[j] = z[j] > 0.0f ? z[j] : z[j] * slope;
    }
    if (residual.data) {
      const float* p = residual.at(n, y, x, lane);
      for (int j = 0; j < 4; ++j) z[j] += load(p + j * residual.sw);
    }
    float* p = side.at(n, y, x, lane);
    for (int j = 0; j < 4; ++j) store(p + j * side.sw, z[j]);
  }
};

// Asks for every worker's scratch before the work starts, where a failure can still be reported.
inline bool reserve_workers(const Runtime& rt, int64_t n_floats) {
  for (int w = 0; w < rt.n_threads; ++w)
    if (!rt.scratch(rt.self, w, static_cast<size_t>(n_floats))) return false;
  return true;
}
inline float* worker_scratch(const Runtime& rt, int worker, int64_t n_floats) {
  return rt.scratch(rt.self, worker, static_cast<size_t>(n_floats));
}

template <class F>
void parallel(const Runtime& rt, int64_t n_items, const F& f) {
  rt.run(
      rt.self, n_items, [](void* ctx, int64_t item, int worker) { (*static_cast<const F*>(ctx))(item, worker); },
      const_cast<F*>(&f));
}

// Per-channel values of the convolution in the order of a side's lanes, 0 in the padding.
inline void pack_conv_channels(const Side& side, const float* values, float* packed) {
  for (size_t g = 0; g < side.lanes.size(); ++g)
    for (int l = 0; l < kWidth; ++l) {
      const Lane& lane = side.lanes[g];
      packed[g * kWidth + l] = l < lane.count ? values[lane.channel + l * lane.step] : 0.0f;
    }
}

inline void pack_slopes(const Side& side, const Activation& act, float* packed) {
  for (size_t g = 0; g < side.lanes.size(); ++g)
    for (int l = 0; l < kWidth; ++l) {
      const Lane& lane = side.lanes[g];
      float slope = act.kind == Act::prelu ? (l < lane.count ? act.slopes[lane.image_channel + l] : 0.0f) : act.slope;
      packed[g * kWidth + l] = slope;
    }
}

}  // namespace
