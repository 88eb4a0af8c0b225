// Checks arrays and hands them to the kernels; nothing is computed here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "pool.h"

namespace nb = nanobind;
using namespace cadyq;

namespace {

using Pixels = nb::ndarray<float, nb::ndim<4>, nb::device::cpu>;
using Flat = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const char* const kIsas[] = {"avx512", "avx2", "portable"};

std::vector<std::string> isas() {
  std::vector<std::string> found;
  for (const char* name : kIsas)
    if (kernels_for(name)) found.push_back(name);
  return found;
}

const Kernels& select(const std::string& isa) {
  const char* forced = std::getenv("CADYQ_ISA");
  std::string name = !isa.empty() ? isa : forced && *forced ? forced : isas().front();
  const Kernels* found = kernels_for(name.c_str());
  if (!found) {
    std::string all;
    for (const auto& n : isas()) all += (all.empty() ? "" : ", ") + n;
    throw std::invalid_argument("isa is '" + name + "', expected one of: " + all);
  }
  return *found;
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

Image image(const Pixels& t, const char* what, int64_t n, int64_t c, int64_t h, int64_t w) {
  if (static_cast<int64_t>(t.shape(0)) != n || static_cast<int64_t>(t.shape(1)) != c ||
      static_cast<int64_t>(t.shape(2)) != h || static_cast<int64_t>(t.shape(3)) != w)
    throw std::invalid_argument(std::string(what) + " has the wrong shape");
  if (c > 1 && t.stride(1) != 1)
    throw std::invalid_argument(std::string(what) + " is not channels-last: channels must be adjacent in memory");
  return {t.data(), t.stride(0), t.stride(2), t.stride(3)};
}

const float* values(const std::optional<Flat>& t, const char* what, int64_t n) {
  if (!t) return nullptr;
  if (static_cast<int64_t>(t->size()) != n) throw std::invalid_argument(std::string(what) + " has the wrong size");
  return t->data();
}

Activation activation(int act, float slope, const std::optional<Flat>& slopes, int64_t channels) {
  require(act >= 0 && act <= 3, "act is outside 0..3");
  require((act == 3) == slopes.has_value(), "slopes are needed for act = 3 and only for it");
  return {static_cast<Act>(act), slope, values(slopes, "slopes", channels)};
}

// The convolution between x (n, ci, h, w) and a weight (co, ci / groups, k, k).
ConvShape shape(const Pixels& x, const Pixels& weight, int groups, int shuffle) {
  ConvShape s{};
  s.n = static_cast<int64_t>(x.shape(0));
  s.ci = static_cast<int>(x.shape(1));
  s.h = static_cast<int64_t>(x.shape(2));
  s.w = static_cast<int64_t>(x.shape(3));
  s.co = static_cast<int>(weight.shape(0));
  s.groups = groups;
  s.kernel = static_cast<int>(weight.shape(2));
  s.shuffle = shuffle;
  require(groups >= 1 && shuffle >= 1, "groups and shuffle must be at least 1");
  require(s.n > 0 && s.h > 0 && s.w > 0 && s.ci > 0 && s.co > 0, "an array is empty");
  require((s.kernel == 1 || s.kernel == 3) && weight.shape(3) == weight.shape(2), "weight is neither 1x1 nor 3x3");
  require(s.ci % groups == 0 && s.co % groups == 0 && static_cast<int>(weight.shape(1)) == s.ci / groups,
          "weight does not fit x and groups");
  require(s.co / groups % (shuffle * shuffle) == 0, "output channels of a group are not a multiple of shuffle^2");
  int64_t step = 1;
  for (int d = 3; d >= 0; step *= static_cast<int64_t>(weight.shape(d)), --d)
    require(weight.shape(d) == 1 || weight.stride(d) == step, "weight is not contiguous");
  return s;
}

struct Output {
  int64_t n, c, h, w;
  Image of(const Pixels& t, const char* what) const { return image(t, what, n, c, h, w); }
};
Output output(const ConvShape& s) { return {s.n, s.co / (s.shuffle * s.shuffle), s.h * s.shuffle, s.w * s.shuffle}; }

template <class F>
void compute(int n_threads, const F& f) {
  bool done;
  {
    nb::gil_scoped_release release;
    PoolLease lease(n_threads);
    done = f(lease.runtime());
  }
  if (!done) throw std::bad_alloc();
}

void conv_forward(Pixels x, Pixels weight, std::optional<Flat> bias, std::optional<Pixels> residual, Pixels y,
                  std::optional<Pixels> pre, int act, float slope, std::optional<Flat> slopes, int groups, int shuffle,
                  int n_threads, const std::string& isa) {
  const ConvKernels& k = *select(isa).conv;
  ConvShape s = shape(x, weight, groups, shuffle);
  Output out = output(s);
  Activation a = activation(act, slope, slopes, out.c);
  Image xi = image(x, "x", s.n, s.ci, s.h, s.w), yi = out.of(y, "y"), ri{}, pi{};
  if (residual) ri = out.of(*residual, "residual");
  if (pre) pi = out.of(*pre, "pre");
  const float* b = values(bias, "bias", s.co);
  compute(n_threads, [&](const Runtime& rt) {
    return k.forward(s, xi, weight.data(), b, residual ? &ri : nullptr, yi, pre ? &pi : nullptr, a, rt);
  });
}

void conv_input_grad(Pixels dy, Pixels weight, std::optional<Pixels> mask, Pixels dx, int act, float slope,
                     std::optional<Flat> slopes, int groups, int shuffle, int n_threads, const std::string& isa) {
  const ConvKernels& k = *select(isa).conv;
  ConvShape s = shape(dx, weight, groups, shuffle);
  Output out = output(s);
  Activation a = activation(act, slope, slopes, out.c);
  require((act == 0) == !mask, "mask is needed with an activation and only then");
  Image xi = image(dx, "dx", s.n, s.ci, s.h, s.w), yi = out.of(dy, "dy"), mi{};
  if (mask) mi = out.of(*mask, "mask");
  compute(n_threads, [&](const Runtime& rt) {
    return k.input_grad(s, yi, weight.data(), mask ? &mi : nullptr, xi, a, rt);
  });
}

void conv_weight_grad(Pixels x, Pixels dy, std::optional<Pixels> mask, Pixels dweight, std::optional<Flat> dbias,
                      std::optional<Flat> dslopes, int act, float slope, std::optional<Flat> slopes, int groups,
                      int shuffle, int n_threads, const std::string& isa) {
  const ConvKernels& k = *select(isa).conv;
  ConvShape s = shape(x, dweight, groups, shuffle);
  Output out = output(s);
  Activation a = activation(act, slope, slopes, out.c);
  require((act == 0) == !mask, "mask is needed with an activation and only then");
  require(!dslopes || act == 3, "dslopes need act = 3");
  Image xi = image(x, "x", s.n, s.ci, s.h, s.w), yi = out.of(dy, "dy"), mi{};
  if (mask) mi = out.of(*mask, "mask");
  auto db = const_cast<float*>(values(dbias, "dbias", s.co));
  auto ds = const_cast<float*>(values(dslopes, "dslopes", out.c));
  compute(n_threads, [&](const Runtime& rt) {
    return k.weight_grad(s, xi, yi, mask ? &mi : nullptr, dweight.data(), db, ds, a, rt);
  });
}

Mixture mixture(const Pixels& x, const Flat& scale, const Flat& clip, const Flat& levels, bool is_signed) {
  require(scale.size() == x.shape(1), "scale does not have one value per channel");
  require(clip.size() > 0 && clip.size() == levels.size(), "clip and levels differ in size or are empty");
  require(x.size() > 0, "x is empty");
  return {static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(2)), static_cast<int64_t>(x.shape(3)),
          static_cast<int>(x.shape(1)), static_cast<int>(clip.size()), is_signed, scale.data(), clip.data(),
          levels.data()};
}

void mixture_forward(Pixels x, Flat scale, Flat clip, Flat levels, Indices chosen, bool is_signed, Pixels y,
                     int n_threads, const std::string& isa) {
  const MixtureKernels& k = *select(isa).mixture;
  Mixture m = mixture(x, scale, clip, levels, is_signed);
  require(static_cast<int64_t>(chosen.size()) == m.n, "chosen does not have one index per sample");
  for (size_t i = 0; i < chosen.size(); ++i)
    require(chosen.data()[i] >= 0 && chosen.data()[i] < m.k, "chosen holds an index outside the candidates");
  Image xi = image(x, "x", m.n, m.c, m.h, m.w), yi = image(y, "y", m.n, m.c, m.h, m.w);
  compute(n_threads, [&](const Runtime& rt) { return k.forward(m, xi, chosen.data(), yi, rt); });
}

void mixture_backward(Pixels x, Flat scale, Flat clip, Flat levels, Flat prob, bool is_signed, Pixels dy, Pixels dx,
                      Flat dprob, Flat dclip, int n_threads, const std::string& isa) {
  const MixtureKernels& k = *select(isa).mixture;
  Mixture m = mixture(x, scale, clip, levels, is_signed);
  require(static_cast<int64_t>(prob.size()) == m.n * m.k && prob.size() == dprob.size(), "prob or dprob is not (N, K)");
  require(static_cast<int>(dclip.size()) == m.k, "dclip is not (K)");
  Image xi = image(x, "x", m.n, m.c, m.h, m.w), gi = image(dy, "dy", m.n, m.c, m.h, m.w),
        di = image(dx, "dx", m.n, m.c, m.h, m.w);
  compute(n_threads, [&](const Runtime& rt) {
    return k.backward(m, xi, gi, prob.data(), di, dprob.data(), dclip.data(), rt);
  });
}

void deviation(Pixels x, Flat result, int n_threads, const std::string& isa) {
  const MixtureKernels& k = *select(isa).mixture;
  require(x.size() > 0, "x is empty");
  Mixture m{};
  m.n = static_cast<int64_t>(x.shape(0)), m.c = static_cast<int>(x.shape(1));
  m.h = static_cast<int64_t>(x.shape(2)), m.w = static_cast<int64_t>(x.shape(3));
  require(static_cast<int64_t>(result.size()) == m.n * m.c, "result is not (N, C)");
  Image xi = image(x, "x", m.n, m.c, m.h, m.w);
  compute(n_threads, [&](const Runtime& rt) { return k.deviation(m, xi, result.data(), rt); });
}

}  // namespace

// An uninitialised channels-last image batch whose memory is kept for later when it is dropped.
nb::ndarray<nb::pytorch, float> empty(size_t n, size_t c, size_t h, size_t w) {
  require(n && c && h && w, "an extent is 0");
  void* block = block_alloc(n * c * h * w * sizeof(float));
  if (!block) throw std::bad_alloc();
  nb::capsule owner(block, [](void* p) noexcept { block_free(p); });
  const size_t shape[4] = {n, c, h, w};
  const auto i = [](size_t v) { return static_cast<int64_t>(v); };
  const int64_t strides[4] = {i(h * w * c), 1, i(w * c), i(c)};
  return nb::ndarray<nb::pytorch, float>(block, 4, shape, owner, strides);
}

// Arrays are never converted: what a kernel writes into a converted copy would be lost.
NB_MODULE(_train_conv, m) {
  m.doc() = "Convolutions and quantisers for training on a CPU; see cadyq.training.fastconv and fastquant.";
  m.def("isas", &isas, "Instruction sets that this build and this processor share, fastest first.");
  m.def("empty", &empty, nb::arg("n"), nb::arg("c"), nb::arg("h"), nb::arg("w"));
  m.def("release", &block_release, "Gives the memory of dropped arrays back to the system.");
  m.def("conv_forward", &conv_forward, nb::arg("x").noconvert(), nb::arg("weight").noconvert(), nb::arg("bias").noconvert().none(),
        nb::arg("residual").noconvert().none(), nb::arg("y").noconvert(), nb::arg("pre").noconvert().none(), nb::arg("act"), nb::arg("slope"),
        nb::arg("slopes").noconvert().none(), nb::arg("groups"), nb::arg("shuffle"), nb::arg("n_threads"), nb::arg("isa") = "");
  m.def("conv_input_grad", &conv_input_grad, nb::arg("dy").noconvert(), nb::arg("weight").noconvert(), nb::arg("mask").noconvert().none(), nb::arg("dx").noconvert(),
        nb::arg("act"), nb::arg("slope"), nb::arg("slopes").noconvert().none(), nb::arg("groups"), nb::arg("shuffle"),
        nb::arg("n_threads"), nb::arg("isa") = "");
  m.def("conv_weight_grad", &conv_weight_grad, nb::arg("x").noconvert(), nb::arg("dy").noconvert(), nb::arg("mask").noconvert().none(),
        nb::arg("dweight").noconvert(), nb::arg("dbias").noconvert().none(), nb::arg("dslopes").noconvert().none(), nb::arg("act"), nb::arg("slope"),
        nb::arg("slopes").noconvert().none(), nb::arg("groups"), nb::arg("shuffle"), nb::arg("n_threads"), nb::arg("isa") = "");
  m.def("mixture_forward", &mixture_forward, nb::arg("x").noconvert(), nb::arg("scale").noconvert(), nb::arg("clip").noconvert(), nb::arg("levels").noconvert(),
        nb::arg("chosen").noconvert(), nb::arg("is_signed"), nb::arg("y").noconvert(), nb::arg("n_threads"), nb::arg("isa") = "");
  m.def("mixture_backward", &mixture_backward, nb::arg("x").noconvert(), nb::arg("scale").noconvert(), nb::arg("clip").noconvert(), nb::arg("levels").noconvert(),
        nb::arg("prob").noconvert(), nb::arg("is_signed"), nb::arg("dy").noconvert(), nb::arg("dx").noconvert(), nb::arg("dprob").noconvert(), nb::arg("dclip").noconvert(),
        nb::arg("n_threads"), nb::arg("isa") = "");
  m.def("deviation", &deviation, nb::arg("x").noconvert(), nb::arg("result").noconvert(), nb::arg("n_threads"), nb::arg("isa") = "");
}
