// The convolution kernels of one instruction set (CADYQ_ISA); compiled once for each.
#include "rows.h"
#include "winograd.h"

namespace {

// Which algorithm a group's convolution takes, seen from `in` to `out`.
enum class Way { rows, thin, winograd };
constexpr int kThin = 4;

inline Way choose(const ConvShape& s, int in, int out, int out_shuffle) {
  if (s.kernel == 1 || in <= kThin) return Way::rows;
  return out <= kThin && out_shuffle == 1 ? Way::thin : Way::winograd;
}

// Scratch of the whole call, cut into 64-byte aligned pieces: slopes, bias, then the algorithm's own.
struct Pieces {
  float *slopes, *bias, *work;
  bool take(const Runtime& rt, int64_t lanes, int64_t work_floats) {
    slopes = rt.scratch(rt.self, -1, static_cast<size_t>(2 * lanes + work_floats));
    bias = slopes + lanes;
    work = bias + lanes;
    return slopes != nullptr;
  }
};

int64_t apply_floats(Way way, const ConvShape& s, const Side& in, const Side& out) {
  switch (way) {
    case Way::rows: return rows_apply_floats(s, in, out);
    case Way::thin: return thin_apply_floats(in, out);
    default: return winograd_apply_floats(in, out);
  }
}

bool apply(Way way, const ConvShape& s, const Source& in, const Filter& f, const Sink& out, const Runtime& rt,
           float* work) {
  switch (way) {
    case Way::rows: return rows_apply(s, in, f, out, rt, work);
    case Way::thin: return thin_apply(s, in, f, out, rt, work);
    default: return winograd_apply(s, in, f, out, rt, work);
  }
}

bool forward(const ConvShape& s, const Image& x, const float* weight, const float* bias, const Image* residual,
             const Image& y, const Image* pre, const Activation& act, const Runtime& rt) {
  const int ci = s.ci / s.groups, co = s.co / s.groups, taps = s.kernel * s.kernel;
  for (int g = 0; g < s.groups; ++g) {
    Source in;
    in.side = make_side(&x, g * ci, ci, 1);
    Sink out;
    out.side = make_side(&y, g * co, co, s.shuffle);
    out.pre = make_side(pre, g * co, co, s.shuffle);
    out.residual = make_side(residual, g * co, co, s.shuffle);
    out.act = act.kind;
    const Way way = choose(s, ci, co, s.shuffle);
    Pieces at;
    if (!at.take(rt, out.side.padded(), apply_floats(way, s, in.side, out.side))) return false;
    pack_slopes(out.side, act, at.slopes);
    out.slopes = at.slopes;
    if (bias) {
      pack_conv_channels(out.side, bias + g * co, at.bias);
      out.bias = at.bias;
    }
    Filter f{weight + static_cast<int64_t>(g) * co * ci * taps, taps, static_cast<int64_t>(ci) * taps, taps, false};
    if (!apply(way, s, in, f, out, rt, at.work)) return false;
  }
  return true;
}

Source make_grad(const ConvShape& s, const Image& dy, const Image* mask, const Activation& act, int g) {
  const int co = s.co / s.groups;
  Source from;
  from.side = make_side(&dy, g * co, co, s.shuffle);
  from.mask = make_side(act.kind == Act::none ? nullptr : mask, g * co, co, s.shuffle);
  from.act = act.kind;
  return from;
}

bool input_grad(const ConvShape& s, const Image& dy, const float* weight, const Image* mask, const Image& dx,
                const Activation& act, const Runtime& rt) {
  const int ci = s.ci / s.groups, co = s.co / s.groups, taps = s.kernel * s.kernel;
  for (int g = 0; g < s.groups; ++g) {
    Source in = make_grad(s, dy, mask, act, g);
    Sink out;
    out.side = make_side(&dx, g * ci, ci, 1);
    const Way way = choose(s, co, ci, 1);
    Pieces at;
    if (!at.take(rt, in.side.padded(), apply_floats(way, s, in.side, out.side))) return false;
    pack_slopes(in.side, act, at.slopes);
    in.slopes = at.slopes;
    Filter f{weight + static_cast<int64_t>(g) * co * ci * taps, static_cast<int64_t>(ci) * taps, taps, taps, true};
    if (!apply(way, s, in, f, out, rt, at.work)) return false;
  }
  return true;
}

bool weight_grad(const ConvShape& s, const Image& x, const Image& dy, const Image* mask, float* dweight, float* dbias,
                 float* dslopes, const Activation& act, const Runtime& rt) {
  const int ci = s.ci / s.groups, co = s.co / s.groups, taps = s.kernel * s.kernel;
  if (dslopes)
    for (int c = 0; c < s.co / (s.shuffle * s.shuffle); ++c) dslopes[c] = 0.0f;
  for (int g = 0; g < s.groups; ++g) {
    Source in, from = make_grad(s, dy, mask, act, g);
    in.side = make_side(&x, g * ci, ci, 1);
    const Way way = choose(s, ci, co, s.shuffle);
    Pieces at;
    int64_t work = way == Way::winograd ? winograd_grad_floats(s, in.side, from.side)
                   : way == Way::thin   ? thin_grad_floats(s, in.side, from.side)
                                        : rows_grad_floats(s, in.side, from.side);
    if (!at.take(rt, from.side.padded(), work)) return false;
    pack_slopes(from.side, act, at.slopes);
    from.slopes = at.slopes;
    Gradients to{dweight + static_cast<int64_t>(g) * co * ci * taps, dbias ? dbias + g * co : nullptr, dslopes};
    auto grad = way == Way::winograd ? winograd_grad : way == Way::thin ? thin_grad : rows_grad;
    if (!grad(s, in, from, to, rt, at.work)) return false;
  }
  return true;
}

}  // namespace

#define CADYQ_NAME_(isa) #isa
#define CADYQ_NAME(isa) CADYQ_NAME_(isa)
#define CADYQ_JOIN_(a, b) a##b
#define CADYQ_JOIN(a, b) CADYQ_JOIN_(a, b)

namespace cadyq {
extern const ConvKernels CADYQ_JOIN(conv_kernels_, CADYQ_ISA);
const ConvKernels CADYQ_JOIN(conv_kernels_, CADYQ_ISA) = {CADYQ_NAME(CADYQ_ISA), forward, input_grad, weight_grad};
}  // namespace cadyq
