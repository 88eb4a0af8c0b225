// What the parts of the training kernels agree on: plain structs and tables of functions, no templates and no inline
// code, because files compiled for different instruction sets include this one and the linker would merge it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cadyq {

// A float32 image batch (N, C, H, W) whose channels are adjacent in memory. Strides count floats.
struct Image {
  float* data;
  int64_t stride_n, stride_h, stride_w;
};

enum class Act : int { none = 0, relu = 1, leaky = 2, prelu = 3 };

// y = z > 0 ? z : slope * z; prelu has one slope per channel of the image that is written (after any PixelShuffle).
struct Activation {
  Act kind;
  float slope;
  const float* slopes;
};

// A stride-1 convolution with "same" zero padding. `h` and `w` are those of the convolution; the image on its output
// side has r times the height and width and co / r^2 channels, r = shuffle.
struct ConvShape {
  int64_t n, h, w;
  int ci, co, groups, kernel, shuffle;
};

// Threads and scratch memory, lent for the length of one call.
struct Runtime {
  void* self;
  int n_threads;
  // Calls fn(ctx, item, worker) for every item in [0, n_items); worker is in [0, n_threads).
  void (*run)(void* self, int64_t n_items, void (*fn)(void* ctx, int64_t item, int worker), void* ctx);
  // Uninitialised 64-byte aligned memory of a worker, or with worker = -1 of the whole call; asking again for the same
  // worker may move it. Null when the memory cannot be had.
  float* (*scratch)(void* self, int worker, size_t n_floats);
};

struct ConvKernels {
  const char* name;
  // y = act(conv(x, weight) + bias) + residual, PixelShuffled; `pre` (may be null) receives conv + bias.
  bool (*forward)(const ConvShape&, const Image& x, const float* weight, const float* bias, const Image* residual,
                  const Image& y, const Image* pre, const Activation&, const Runtime&);
  // dx from dy. `mask` holds values with the signs of the activation's argument; null without an activation.
  bool (*input_grad)(const ConvShape&, const Image& dy, const float* weight, const Image* mask, const Image& dx,
                     const Activation&, const Runtime&);
  // dweight and, where not null, dbias and dslopes. dslopes needs `mask` to be the activation's argument itself.
  bool (*weight_grad)(const ConvShape&, const Image& x, const Image& dy, const Image* mask, float* dweight,
                      float* dbias, float* dslopes, const Activation&, const Runtime&);
};

// The candidates of one quantiser: `scale` per channel (C), `clip` and `levels` per candidate (K).
struct Mixture {
  int64_t n, h, w;
  int c, k;
  bool is_signed;
  const float* scale;
  const float* clip;
  const float* levels;
};

struct MixtureKernels {
  // y = Q_chosen[n](x)
  bool (*forward)(const Mixture&, const Image& x, const int32_t* chosen, const Image& y, const Runtime&);
  // dx (N,C,H,W), dprob (N,K), dclip (K) from dy and prob (N,K)
  bool (*backward)(const Mixture&, const Image& x, const Image& dy, const float* prob, const Image& dx, float* dprob,
                   float* dclip, const Runtime&);
  // Unbiased standard deviation of every sample's channels (N, C), 0 where there is one pixel; `m` needs its extents only.
  bool (*deviation)(const Mixture& m, const Image& x, float* result, const Runtime&);
};

struct Kernels {
  const ConvKernels* conv;
  const MixtureKernels* mixture;
};

// Null where this build or this processor lacks the instruction set.
const Kernels* kernels_for(const char* isa);

}  // namespace cadyq
