// Weight gradients are sums over all pixels, taken in chunks. Their number follows from the problem alone and they are
// added up in order, so a result does not depend on which thread did what, nor on how many there are.
#pragma once
#include "layout.h"

namespace {

inline int64_t n_chunks(int64_t units, int64_t least) { return max64(1, min64(32, units / least)); }

// Where the gradients of one group go; weights (out, in, taps), the others per channel or null.
struct Gradients {
  float* weight;
  float* bias;
  float* slopes;
};

// What one chunk sums up: [tap][in][out], then the bias and the slopes per out.
inline int64_t partial_floats(int taps, int64_t n_in, int64_t n_out) { return (taps * n_in + 2) * n_out; }

// Adds up the chunks' sums in order and writes them in torch's layout. `in_channel`: the channel of a row, -1 for padding.
template <class InChannel>
inline void reduce_partials(const float* partial, int64_t chunks, int taps, int64_t n_in, const Side& out,
                            int64_t out_stride, const InChannel& in_channel, const Gradients& to, const Runtime& rt) {
  const int64_t n_out = out.padded(), floats = partial_floats(taps, n_in, n_out);
  auto total = [&](int64_t offset) {
    Vec v = load(partial + offset);
    for (int64_t k = 1; k < chunks; ++k) v += load(partial + k * floats + offset);
    return v;
  };
  parallel(rt, static_cast<int64_t>(out.lanes.size()), [&](int64_t g, int) {
    const Lane& lane = out.lanes[static_cast<size_t>(g)];
    for (int64_t c = 0; c < n_in; ++c) {
      int64_t channel = in_channel(c);
      if (channel < 0) continue;
      for (int t = 0; t < taps; ++t) {
        Vec v = total((t * n_in + c) * n_out + g * kWidth);
        for (int l = 0; l < lane.count; ++l)
          to.weight[(lane.channel + l * lane.step) * out_stride + channel * taps + t] = v[l];
      }
    }
    if (to.bias) {
      Vec v = total(taps * n_in * n_out + g * kWidth);
      for (int l = 0; l < lane.count; ++l) to.bias[lane.channel + l * lane.step] = v[l];
    }
  });
  // Under PixelShuffle several channels of the convolution share a slope.
  if (to.slopes)
    for (size_t g = 0; g < out.lanes.size(); ++g) {
      Vec v = total((taps * n_in + 1) * n_out + static_cast<int64_t>(g) * kWidth);
      for (int l = 0; l < out.lanes[g].count; ++l) to.slopes[out.lanes[g].image_channel + l] += v[l];
    }
}

}  // namespace
