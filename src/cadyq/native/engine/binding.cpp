// Python binding: builds a network from arrays and runs it without the interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(CADYQ_HAS_AVXVNNI)
#include <cpuid.h>
#endif

#include "exits.h"
#include "network.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

template <class T>
std::vector<T> copy(const Array<T>& a) {
  return std::vector<T>(a.data(), a.data() + a.size());
}

std::vector<std::string> available() {
  std::vector<std::string> names;
#if defined(CADYQ_X86)
  __builtin_cpu_init();
  const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#if defined(CADYQ_AMX)
  if (avx512 && __builtin_cpu_supports("amx-int8") && cadyq_amx_allowed()) names.push_back("amx");
#endif
  if (avx512) names.push_back("avx512vnni");
#if defined(CADYQ_HAS_AVXVNNI)
  // Beside AVX2, as both need the operating system to keep 256-bit registers.
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1)) names.push_back("avxvnni");
#endif
  if (__builtin_cpu_supports("avx2")) names.push_back("avx2");
#endif
#if defined(CADYQ_NEON)
  if (cadyq_has_dotprod()) names.push_back("neondotprod");
#endif
  names.push_back("portable");
  return names;
}

const CadyqKernels* kernels(const std::string& name) {
  for (const auto& n : available()) {
    if (n != name) continue;
#if defined(CADYQ_X86)
#if defined(CADYQ_AMX)
    if (n == "amx") return cadyq_kernels_amx();
#endif
    if (n == "avx512vnni") return cadyq_kernels_avx512vnni();
#if defined(CADYQ_HAS_AVXVNNI)
    if (n == "avxvnni") return cadyq_kernels_avxvnni();
#endif
    if (n == "avx2") return cadyq_kernels_avx2();
#endif
#if defined(CADYQ_NEON)
    if (n == "neondotprod") return cadyq_kernels_neondotprod();
#endif
    return cadyq_kernels_portable();
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

// A network with its threads. A run holds the lock: buffers are shared between runs.
class Runner {
 public:
  Runner(const std::string& isa, int scale, int tile, int threads)
      : network_(kernels(isa), scale, tile), pool_(threads), scale_(scale), tile_(tile) {}

  void add_plane(int channels, int level) {
    network_.add_plane(channels, level);
    plane_channels_.push_back(channels);
  }
  void add_image_in(int dst, Array<float> m8, Array<float> m16, Array<float> offset) {
    cadyq::StepData s;
    s.kind = cadyq::StepData::kImageIn;
    s.dst = dst;
    channels_ = plane_channels_.at(dst);
    s.multiplier8 = copy(m8);
    s.multiplier16 = copy(m16);
    s.offset = copy(offset);
    network_.add_step(std::move(s));
  }
  void add_layer(const cadyq::LayerData& layer) {
    cadyq::StepData s;
    s.kind = cadyq::StepData::kLayer;
    check(layer);
    s.layers.push_back(layer);
    network_.add_step(std::move(s));
  }
  void add_block(int src, int dst, bool residual, const std::vector<cadyq::LayerData>& layers) {
    cadyq::StepData s;
    s.kind = cadyq::StepData::kBlock;
    s.src = src;
    s.dst = dst;
    s.residual = residual;
    for (const auto& layer : layers) check(layer);
    if (layers.empty()) throw std::invalid_argument("a block needs layers");
    s.layers = layers;
    network_.add_step(std::move(s));
  }
  void add_image_out(int src, Array<uint8_t> table8, Array<uint16_t> table16, std::optional<Array<int32_t>> weight,
                     bool symmetric, double gain8, double gain16) {
    if (table8.size() != 65536 || table16.size() != 65536) throw std::invalid_argument("tables need 65536 entries");
    cadyq::StepData s;
    s.kind = cadyq::StepData::kImageOut;
    s.src = src;
    last_channels_ = plane_channels_.at(src);
    s.table8 = copy(table8);
    s.table16 = copy(table16);
    if (weight) {
      if (weight->size() != static_cast<size_t>(scale_) * 5 || last_channels_ != channels_)
        throw std::invalid_argument("the enlarged picture does not fit");
      s.base = {copy(*weight), symmetric, gain8, gain16};
    }
    network_.add_step(std::move(s));
  }
  void finish() { network_.finish(); }

  template <class T>
  void run(nb::ndarray<const T, nb::ndim<3>, nb::c_contig, nb::device::cpu> image,
           nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu> out,
           nb::ndarray<const int8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu> forced,
           nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> exited,
           nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu> bits,
           nb::ndarray<int8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu> choice) {
    const size_t h = image.shape(0), w = image.shape(1), rows = (h + tile_ - 1) / tile_, cols = (w + tile_ - 1) / tile_;
    const size_t n = network_.sites();
    const bool ok = h > 0 && w > 0 && out.shape(0) == h * scale_ && out.shape(1) == w * scale_ &&
                    image.shape(2) == static_cast<size_t>(channels_) &&
                    out.shape(2) == static_cast<size_t>(last_channels_) && forced.shape(0) == rows &&
                    forced.shape(1) == cols && forced.shape(2) == n && exited.shape(0) == rows &&
                    exited.shape(1) == cols && bits.size() == rows * cols * n && choice.size() == rows * cols * n;
    if (!ok) throw std::invalid_argument("arrays do not fit together");
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex_);
    const cadyq::Image in{image.data(), static_cast<int>(h), static_cast<int>(w), sizeof(T) == 2};
    network_.run(pool_, in, out.data(), forced.data(), exited.data(), bits.data(), choice.data());
  }
  std::vector<std::pair<std::string, double>> profile() const { return network_.profile(); }

 private:
  void check(const cadyq::LayerData& layer) const {
    int channels = 0;
    auto add = [&](const std::vector<cadyq::PartData>& parts) {
      for (const auto& p : parts) {
        if (p.first < 0 || p.channels < 1 || p.first + p.channels > plane_channels_.at(p.plane))
          throw std::invalid_argument("a part lies outside its plane");
        channels += p.channels;
      }
    };
    add(layer.src);
    const int c_out = plane_channels_.at(layer.dst) * layer.shuffle * layer.shuffle;
    if (channels != layer.conv.c_in || c_out != layer.conv.c_out || (!layer.borders.empty() && layer.borders.size() != 15))
      throw std::invalid_argument("a layer does not fit its planes");
    channels = 0;
    add(layer.skip.parts);
    if (layer.has_skip && channels != plane_channels_.at(layer.dst)) throw std::invalid_argument("a skip does not fit");
  }

  cadyq::Network network_;
  cadyq::Pool pool_;
  std::mutex mutex_;
  std::vector<int> plane_channels_;
  int scale_, tile_, channels_ = 0, last_channels_ = 0;
};

template <class T>
using Pixels = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

template <class T>
cadyq::Levels levels(const Pixels<const T>& image) {
  if (image.size() == 0 || image.shape(2) != 3) throw std::invalid_argument("a picture needs pixels of three channels");
  return {image.data(), static_cast<int>(image.shape(0)), static_cast<int>(image.shape(1)), sizeof(T) == 2};
}

template <class T>
void cell_sums(Pixels<const T> image, int cell, Pixels<int64_t> sums, int threads) {
  const cadyq::Levels in = levels<T>(image);
  const bool ok = cell > 0 && sums.shape(0) == static_cast<size_t>((in.height + cell - 1) / cell) &&
                  sums.shape(1) == static_cast<size_t>((in.width + cell - 1) / cell) && sums.shape(2) == cadyq::kCellSums;
  if (!ok) throw std::invalid_argument("arrays do not fit together");
  nb::gil_scoped_release release;
  cadyq::Pool pool(threads);
  cadyq::cell_sums(pool, in, cell, sums.data());
}

template <class T>
void fill_exits(Pixels<T> band, Pixels<const T> part, nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> weights,
                nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> exited, int top, int height,
                int first, int cell, int fade, int threads) {
  cadyq::Fill f;
  f.in = levels<T>(part);
  f.top = top;
  f.height = height;
  f.weights = weights.data();
  f.scale = static_cast<int>(weights.shape(0));
  f.cell = cell;
  f.fade = fade;
  f.exited = exited.data();
  f.first = first;
  f.out = band.data();
  f.out_height = static_cast<int>(band.shape(0));
  if (f.scale < 1 || cell < 1 || fade < 0 || first < 0 || band.size() == 0 || band.shape(0) % f.scale)
    throw std::invalid_argument("a number out of range");
  const int y0 = first * cell, y1 = y0 + f.out_height / f.scale;
  const size_t rows = (y1 - y0 + cell - 1) / cell, columns = (f.in.width + cell - 1) / cell;
  // A mirrored row lies no further in than the one it stands for lies out.
  const bool has_rows = top <= std::max(0, y0 - 2) && std::min(height, y1 + 2) <= top + f.in.height;
  const bool ok = weights.shape(1) == 5 && band.shape(1) == static_cast<size_t>(f.in.width) * f.scale &&
                  band.shape(2) == 3 && exited.shape(0) == rows + 2 && exited.shape(1) == columns + 2 && y1 <= height;
  if (!ok || !has_rows) throw std::invalid_argument("arrays do not fit together");
  nb::gil_scoped_release release;
  cadyq::Pool pool(threads);
  cadyq::fill_exits(pool, f);
}

using Parts = std::vector<std::tuple<int, int, int>>;

std::vector<cadyq::PartData> make_parts(const Parts& parts) {
  std::vector<cadyq::PartData> made;
  for (const auto& [plane, first, channels] : parts) made.push_back({plane, first, channels});
  return made;
}

cadyq::ConvData make_conv(nb::ndarray<const int8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu> weight,
                          Array<float> factor, Array<float> bias, std::optional<Array<float>> slope,
                          std::optional<cadyq::SiteData> site, int groups, int levels,
                          std::optional<Array<float>> gain) {
  cadyq::ConvData c;
  c.c_out = static_cast<int>(weight.shape(0));
  c.kernel = static_cast<int>(weight.shape(1));
  c.groups = groups;
  c.c_in = static_cast<int>(weight.shape(3)) * groups;
  c.weight.assign(weight.data(), weight.data() + weight.size());
  c.factor = copy(factor);
  c.bias = copy(bias);
  if (slope) c.slope = copy(*slope);
  if (gain) c.gain = copy(*gain);
  c.levels = levels;
  c.has_site = site.has_value();
  if (site) c.site = *site;
  const size_t n = site ? site->bits.size() : 1, outputs = static_cast<size_t>(c.c_out);
  const bool ok = groups > 0 && c.c_out % groups == 0 && c.factor.size() == n * c.c_out && c.bias.size() == outputs &&
                  (!slope || c.slope.size() == outputs) && (levels == 0 || c.gain.size() == outputs) &&
                  (!site || site->multiplier.size() == n * c.c_in) &&
                  (!site || site->inverse_scale.empty() || site->inverse_scale.size() == static_cast<size_t>(c.c_in));
  if (!ok) throw std::invalid_argument("convolution arrays do not fit together");
  return c;
}

cadyq::SiteData make_site(std::vector<int> bits, double step, bool counted, Array<float> multiplier, Array<int32_t> low,
                          Array<int32_t> high, std::optional<Array<double>> weight,
                          std::optional<Array<double>> bias, double log_offset,
                          std::optional<Array<double>> inverse_scale) {
  cadyq::SiteData s;
  s.log_offset = log_offset;
  s.bits = std::move(bits);
  s.step = step;
  s.counted = counted;
  s.multiplier = copy(multiplier);
  s.low.assign(low.data(), low.data() + low.size());
  s.high.assign(high.data(), high.data() + high.size());
  if (weight && bias) {
    s.weight = copy(*weight);
    s.bias = copy(*bias);
  }
  if (inverse_scale) s.inverse_scale = copy(*inverse_scale);
  const size_t n = s.bits.size();
  if (s.low.size() != n || s.high.size() != n || (n > 1 && s.bias.size() != n))
    throw std::invalid_argument("site arrays do not fit together");
  return s;
}

cadyq::SkipData make_skip(const Parts& parts, std::optional<Array<float>> ratio, std::optional<cadyq::SiteData> site,
                          bool shared) {
  cadyq::SkipData s;
  s.parts = make_parts(parts);
  if (ratio) s.ratio = copy(*ratio);
  s.has_site = site.has_value();
  if (site) s.site = *site;
  s.shared = shared;
  return s;
}

cadyq::LayerData make_layer(const Parts& src, int dst, const cadyq::ConvData& conv, std::optional<cadyq::SkipData> skip,
                            int shuffle, bool rectify, const std::vector<cadyq::ConvData>& borders) {
  cadyq::LayerData layer;
  layer.src = make_parts(src);
  layer.dst = dst;
  layer.conv = conv;
  layer.has_skip = skip.has_value();
  if (skip) layer.skip = *skip;
  layer.shuffle = shuffle;
  layer.rectify = rectify;
  layer.borders = borders;
  return layer;
}

}  // namespace

NB_MODULE(_engine, m) {
  nb::class_<cadyq::SiteData>(m, "Site");
  nb::class_<cadyq::ConvData>(m, "Conv");
  nb::class_<cadyq::SkipData>(m, "Skip");
  nb::class_<cadyq::LayerData>(m, "Layer");
  m.def("site", &make_site, "bits"_a, "step"_a, "counted"_a, "multiplier"_a, "low"_a, "high"_a, "weight"_a.none(),
        "bias"_a.none(), "log_offset"_a, "inverse_scale"_a.none());
  m.def("conv", &make_conv, "weight"_a, "factor"_a, "bias"_a, "slope"_a.none(), "site"_a.none(), "groups"_a, "levels"_a,
        "gain"_a.none());
  m.def("skip", &make_skip, "parts"_a, "ratio"_a.none(), "site"_a.none(), "shared"_a);
  m.def("layer", &make_layer, "src"_a, "dst"_a, "conv"_a, "skip"_a.none(), "shuffle"_a, "rectify"_a, "borders"_a);
  m.def("available", &available);
  m.def("cell_sums8", &cell_sums<uint8_t>, "image"_a, "cell"_a, "sums"_a.noconvert(), "threads"_a);
  m.def("cell_sums16", &cell_sums<uint16_t>, "image"_a, "cell"_a, "sums"_a.noconvert(), "threads"_a);
  m.def("fill_exits8", &fill_exits<uint8_t>, "band"_a.noconvert(), "part"_a, "weights"_a, "exited"_a, "top"_a,
        "height"_a, "first"_a, "cell"_a, "fade"_a, "threads"_a);
  m.def("fill_exits16", &fill_exits<uint16_t>, "band"_a.noconvert(), "part"_a, "weights"_a, "exited"_a, "top"_a,
        "height"_a, "first"_a, "cell"_a, "fade"_a, "threads"_a);
  nb::class_<Runner>(m, "Runner")
      .def(nb::init<const std::string&, int, int, int>(), "isa"_a, "scale"_a, "tile"_a, "threads"_a)
      .def("add_plane", &Runner::add_plane, "channels"_a, "level"_a)
      .def("add_image_in", &Runner::add_image_in, "dst"_a, "multiplier8"_a, "multiplier16"_a, "offset"_a)
      .def("add_layer", &Runner::add_layer, "layer"_a)
      .def("add_block", &Runner::add_block, "src"_a, "dst"_a, "residual"_a, "layers"_a)
      .def("add_image_out", &Runner::add_image_out, "src"_a, "table8"_a, "table16"_a, "weight"_a.none(), "symmetric"_a,
           "gain8"_a, "gain16"_a)
      .def("finish", &Runner::finish)
      .def("run8", &Runner::run<uint8_t>, "image"_a, "out"_a, "forced"_a, "exited"_a, "bits"_a, "choice"_a)
      .def("run16", &Runner::run<uint16_t>, "image"_a, "out"_a, "forced"_a, "exited"_a, "bits"_a, "choice"_a)
      .def("profile", &Runner::profile);
}
