// Groups of layers, which advance together by strips of rows: only what the next strip needs is kept.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "exits.h"
#include "network.h"

namespace cadyq {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int16_t clamp16(float v) {
  return static_cast<int16_t>(std::lrintf(std::min(std::max(v, -32768.f), 32767.f)));
}

template <class T>
void image_row(const T* src, int width, int channels, const float* multiplier, const float* offset, int16_t* dst) {
  for (int x = 0; x < width; ++x)
    for (int c = 0; c < channels; ++c) {
      const size_t i = static_cast<size_t>(x) * channels + c;
      float v = static_cast<float>(src[i]) * multiplier[c];
      v = v + offset[c];
      dst[i] = clamp16(v);
    }
}

// Neighbor of a pixel beyond the border; equation (16).
int outside(int i, int n, bool symmetric) {
  if (!symmetric) return std::min(std::max(i, 0), n - 1);
  return mirrored(i, n);
}

template <class T>
void vertical(const T* const rows[5], const int32_t* weight, size_t n, double* out) {
  for (size_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int k = 0; k < 5; ++k) sum += static_cast<double>(weight[k]) * static_cast<double>(rows[k][i]);
    out[i] = sum;
  }
}

// `n` levels for each of `pixels` from values that are `stride` apart, plus `base` where there is one.
template <int N, class T>
void look_up_each(const int16_t* values, int stride, int pixels, int n, const int16_t* base, const T* table, T* out) {
  const T* middle = table + 32768;
  if (N) n = N;
  for (int x = 0; x < pixels; ++x, values += stride, out += n) {
    if (!base) {
      for (int i = 0; i < n; ++i) out[i] = middle[values[i]];
    } else {
      for (int i = 0; i < n; ++i) out[i] = middle[std::min(32767, std::max(-32768, values[i] + base[i]))];
      base += n;
    }
  }
}

template <class T>
void look_up(const int16_t* values, int stride, int pixels, int n, const int16_t* base, const T* table, T* out) {
  switch (n) {  // colors of one, two or four pixels
    case 3: return look_up_each<3>(values, stride, pixels, n, base, table, out);
    case 6: return look_up_each<6>(values, stride, pixels, n, base, table, out);
    case 12: return look_up_each<12>(values, stride, pixels, n, base, table, out);
    default: return look_up_each<0>(values, stride, pixels, n, base, table, out);
  }
}

}  // namespace

void Network::run_group(Pool& pool, Group& group, const Image& in, void* out) {
  for (const Node& node : group.nodes) {
    for (const Source& p : node.skip)
      if (p.plane >= 0) settle(p.plane);
    if (node.dst_plane >= 0) {
      Store& s = stores_[node.dst_plane];
      std::fill(s.tiles.begin(), s.tiles.end(), s.memory[0]);
    }
  }
  for (int strip = 0; strip < group.strips; ++strip)
    for (Node& node : group.nodes) {
      const int from = strip ? node.until[strip - 1] : 0, to = node.until[strip];
      if (from == to) continue;
      const double start = now();
      run_node(pool, group, node, from, to, in, out);
      profile_[node.profile].second += now() - start;
    }
}

void Network::run_node(Pool& pool, Group& group, Node& node, int from, int to, const Image& in, void* out) {
  switch (node.kind) {
    case Node::kImageIn: return run_image_in(pool, group, node, from, to, in);
    case Node::kQuantize: return run_quantize(pool, group, node, from, to);
    case Node::kConv: return run_conv(pool, group, node, from, to);
    case Node::kImageOut: return run_image_out(pool, group, node, from, to, in, out);
  }
}

void Network::run_image_in(Pool& pool, Group& group, const Node& node, int from, int to, const Image& in) {
  const View& dst = *group.views[node.dst_view];
  const StepData& step = *node.step;
  pool.run(to - from, [&](int i, int) {
    const int y = from + i;
    const size_t at = static_cast<size_t>(y) * in.width * dst.channels;
    int16_t* row = reinterpret_cast<int16_t*>(dst.row(y));
    if (in.wide)
      image_row(static_cast<const uint16_t*>(in.data) + at, in.width, dst.channels, step.multiplier16.data(),
                step.offset.data(), row);
    else
      image_row(static_cast<const uint8_t*>(in.data) + at, in.width, dst.channels, step.multiplier8.data(),
                step.offset.data(), row);
  });
}

// Codes, or the int16 values themselves, of some channels into a window of what a convolution reads.
void Network::run_quantize(Pool& pool, Group& group, const Node& node, int from, int to) {
  const Conv& conv = *node.conv;
  const Source& source = node.source;
  const View& dst = *group.views[node.dst_view];
  const int channels = source.whole ? dst.channels : source.channels;
  pool.run(to - from, [&](int i, int t) {
    const int y = from + i;
    auto piece = [&](const int16_t* src, int stride, int x, int n) {
      uint8_t* to_row = dst.row(y) + (static_cast<size_t>(x) * dst.channels + source.offset) * dst.element;
      src += source.first;
      if (!conv.raw) {
        CadyqQuantizer q = conv.quantizer[0];
        q.multiplier += source.offset;
        kernels_->quantize(src, stride, to_row, dst.channels, n, channels, &q, conv.store, 0);
      } else if (stride == channels && dst.channels == channels) {
        std::memcpy(to_row, src, static_cast<size_t>(n) * channels * sizeof(int16_t));
      } else {
        for (int p = 0; p < n; ++p)
          std::memcpy(to_row + static_cast<size_t>(p) * dst.channels * sizeof(int16_t), src + static_cast<size_t>(p) * stride,
                      channels * sizeof(int16_t));
      }
    };
    std::vector<Span>& columns = threads_[t].spans;
    spans(y, y + 1, dst.height / height_, node.margin, columns);
    for (const Span& span : columns) {
      if (source.plane >= 0) {
        const Store& plane = stores_[source.plane];
        for_pieces(plane, y, span.x0, span.x1, [&](const int16_t* src, int x, int n) { piece(src, plane.channels, x, n); });
      } else {
        const View& src = *group.views[source.view];
        const int16_t* row = reinterpret_cast<const int16_t*>(src.row(y));
        piece(row + static_cast<size_t>(span.x0) * src.channels, src.channels, span.x0, span.x1 - span.x0);
      }
    }
  });
}

// Rows of what is added to results: those of its only source, or made from its parts. Coordinates are the target's.
void Network::skip_rows(Group& group, const Node& node, int y0, int y1, int x0, int x1, Thread& thread) {
  thread.residual.clear();
  if (node.skip.empty()) return;
  auto row_of = [&](const Source& p, int y, int* stride) -> const int16_t* {
    if (p.plane >= 0) {
      const Store& s = stores_[p.plane];
      *stride = s.channels;
      return s.memory[0] + static_cast<size_t>(y) * s.width * s.channels;
    }
    const View& v = *group.views[p.view];
    *stride = v.channels;
    return reinterpret_cast<const int16_t*>(v.row(y));
  };
  int stride = 0;
  if (node.skip_direct) {
    for (int y = y0; y < y1; ++y) {
      const int16_t* row = row_of(node.skip[0], y, &stride);
      thread.residual.push_back(row + static_cast<size_t>(x0) * stride);
    }
    return;
  }
  const int channels = node.conv->dst_channels;
  const size_t pitch = static_cast<size_t>(x1 - x0) * channels;
  int16_t* made = reinterpret_cast<int16_t*>(thread.skip.reserve(pitch * (y1 - y0) * sizeof(int16_t)));
  for (int y = y0; y < y1; ++y, made += pitch) {
    for (const Source& p : node.skip) {
      const CadyqSnap snap = node.layer->skip.snap(0, p.offset);
      const int16_t* row = row_of(p, y, &stride) + static_cast<size_t>(x0) * stride + p.first;
      kernels_->snap(row, stride, made + p.offset, channels, x1 - x0, p.channels, &snap);
    }
    thread.residual.push_back(made);
  }
}

// A convolution into a window or a plane, in bands of rows and pieces of columns.
void Network::run_conv(Pool& pool, Group& group, const Node& node, int from, int to) {
  const Conv& conv = *node.conv;
  View* dst = node.dst_view >= 0 ? group.views[node.dst_view].get() : nullptr;
  const View* src = group.views[node.src_view].get();
  const bool winograd = conv.kind == Conv::kWinograd;
  const int band = winograd ? (exited_ ? 8 : 4) : 1, round = 4 * kernels_->winograd_tiles;
  jobs_.clear();
  const int level = src->height / height_, length = exited_ ? 3 : 5;
  auto is_needed = [&](int y, const Span& span) {
    spans(y, y + 1, level, node.margin, threads_[0].row);
    for (const Span& part : threads_[0].row)
      if (part.x0 < span.x1 && part.x1 > span.x0) return true;
    return false;
  };
  for (int y = from; y < to; y += band) {
    spans(y, std::min(to, y + band), level, node.margin, threads_[0].spans);
    for (const Span& span : threads_[0].spans) {
      int y0 = y, y1 = std::min(to, y + band);
      if (exited_) {  // rows of the band that belong to other spans
        while (!is_needed(y0, span)) ++y0;
        while (!is_needed(y1 - 1, span)) --y1;
      }
      // Pieces of several rounds: longer pipelines, and weights are read less often.
      const int width = span.x1 - span.x0, wanted = std::max(1, (width + length * round / 2) / (length * round));
      const int piece = winograd ? ((width + wanted - 1) / wanted + round - 1) / round * round : width;
      for (int x = span.x0; x < span.x1; x += piece) jobs_.push_back({y0, x, y1 - y0, std::min(piece, span.x1 - x)});
    }
  }
  const CadyqEpilogue e = epilogue(conv, 0, node.next, node.layer->data->rectify);
  const int element = e.store == CADYQ_CODE8 ? 1 : 2, r = conv.shuffle;
  pool.run(static_cast<int>(jobs_.size()), [&](int i, int t) {
    Thread& thread = threads_[t];
    const auto [y0, x0, height, width] = jobs_[i];
    const size_t shift = static_cast<size_t>(x0) * conv.pixel_bytes() - static_cast<size_t>(conv.pad) * conv.pixel_bytes();
    const int n_in = (winograd ? (height + 3) / 4 * 4 : height) + 2 * conv.pad;
    thread.in.clear();
    for (int y = 0; y < n_in; ++y) thread.in.push_back(src->row(y0 - conv.pad + y) + shift);
    thread.out.clear();
    const size_t first = static_cast<size_t>(x0) * r * conv.dst_channels;
    for (int y = y0 * r; y < (y0 + height) * r; ++y) {
      uint8_t* row = dst ? dst->row(y) : nullptr;
      if (node.dst_plane >= 0) {
        const Store& s = stores_[node.dst_plane];
        row = reinterpret_cast<uint8_t*>(s.memory[0] + static_cast<size_t>(y) * s.width * s.channels);
      }
      thread.out.push_back(row + first * element);
    }
    skip_rows(group, node, y0 * r, (y0 + height) * r, x0 * r, (x0 + width) * r, thread);
    const CadyqTarget target{thread.out.data(), thread.residual.empty() ? nullptr : thread.residual.data(), r,
                             conv.dst_channels, nullptr};
    convolve(conv, 0, thread.in, height, width, e, target, thread);
  });
}

// ---- the picture ------------------------------------------------------------------------------------------------

void Network::run_image_out(Pool& pool, Group& group, const Node& node, int from, int to, const Image& in, void* out) {
  const View& src = *group.views[node.src_view];
  const int level = src.height / height_, zoom = scale_ / level, channels = planes_[steps_.back().src].channels;
  const size_t row_bytes = static_cast<size_t>(width_) * scale_ * channels * (in.wide ? 2 : 1);
  auto run = [&](int y, int height, Thread& thread) {
    spans(y, y + 1, level, 0, thread.spans);
    uint8_t* line = static_cast<uint8_t*>(out) + static_cast<size_t>(y) * zoom * row_bytes;
    auto clear = [&](int x0, int x1) {
      const size_t pixel = row_bytes / src.width;
      for (int k = 0; x0 < x1 && k < zoom * height; ++k)
        std::memset(line + k * row_bytes + x0 * pixel, 0, (x1 - x0) * pixel);
    };
    int done = 0;
    for (const Span& span : thread.spans) {
      clear(done, span.x0);
      image_span(node, src, span.x0, span.x1, y, height, in, out, thread);
      done = span.x1;
    }
    clear(done, src.width);
  };
  // Four rows at once where kernels can, but for rows of different cells, whose needed columns differ, and for those
  // that have other weights.
  const int band = node.conv->weights4.get() ? 4 : 1, side = tile_ * level;
  const bool bordered = !node.layer->borders.empty();
  pool.run((to - from + band - 1) / band, [&](int i, int t) {
    const int y = from + i * band, end = std::min(to, y + band);
    const bool alike = !exited_ || y / side == (end - 1) / side, inside = !bordered || (y > 0 && end < src.height);
    if (band > 1 && end - y == band && alike && inside) return run(y, band, threads_[t]);
    for (int row = y; row < end; ++row) run(row, 1, threads_[t]);
  });
}

// Pixels of some rows of the last convolution's input, or of `shuffle` rows of the picture for each of them: one row, or
// four of a convolution that has `weights4`.
void Network::image_span(const Node& node, const View& src, int x0, int x1, int y, int height, const Image& in, void* out,
                         Thread& thread) {
  const StepData& end = steps_.back();
  const int channels = planes_[end.src].channels, r = node.layer->data->shuffle, width = src.width * r;
  auto rows_of = [&](const Conv& conv, int x) {
    thread.in.clear();
    for (int k = 0; k < conv.kernel + height - 1; ++k)
      thread.in.push_back(src.row(y - conv.pad + k) +
                          (static_cast<ptrdiff_t>(x) - conv.pad) * static_cast<ptrdiff_t>(conv.pixel_bytes()));
  };
  // Row `dy` of those that row y becomes, from values that are `stride` apart, `sub` apart for each pixel of a PixelShuffle.
  auto write = [&](const int16_t* values, int stride, int y, int dy) {
    const int n = (x1 - x0) * r;  // pixels of the picture
    const int16_t* base = end.base.weight.empty() ? nullptr : enlarged(end.base, in, y * r + dy, x0 * r, x0 * r + n, thread);
    const size_t at = (static_cast<size_t>(y * r + dy) * width + static_cast<size_t>(x0) * r) * channels;
    values += dy * r * channels;
    if (in.wide)
      look_up(values, stride, x1 - x0, r * channels, base, end.table16.data(), static_cast<uint16_t*>(out) + at);
    else
      look_up(values, stride, x1 - x0, r * channels, base, end.table8.data(), static_cast<uint8_t*>(out) + at);
  };
  const Conv& conv = *node.conv;
  if (conv.kind == Conv::kColumns) {
    const CadyqEpilogue e = epilogue(conv, 0, nullptr, false);
    int16_t* values = reinterpret_cast<int16_t*>(thread.rows_out.get());
    rows_of(conv, x0);
    CadyqColumns job{};
    job.rows = thread.in.data();
    job.width = x1 - x0;
    job.kernel = conv.kernel;
    job.pixel_bytes = conv.pixel_bytes();
    job.element = conv.element;
    job.is_signed = !conv.raw && !conv.quantizer[0].is_unsigned;
    job.c_out = conv.c_out;
    job.weights = conv.weights.get();
    job.init = conv.init[0].data();
    job.factor = e.factor;
    job.bias = e.bias;
    job.slope = e.slope;
    job.values = values;
    job.weights4 = reinterpret_cast<const int16_t*>(conv.weights4.get());
    job.pitch = static_cast<size_t>(job.width) * 4;
    (height > 1 ? kernels_->columns4 : kernels_->columns)(&job, thread.kernel.get());
    for (int k = 0; k < height; ++k)
      for (int dy = 0; dy < r; ++dy) write(values + k * job.pitch, 4, y + k, dy);
    return;
  }
  int16_t* values =
      reinterpret_cast<int16_t*>(thread.rows_out.reserve(static_cast<size_t>(x1 - x0) * conv.dst_channels * height * sizeof(int16_t)));
  const size_t pitch = static_cast<size_t>(x1 - x0) * conv.dst_channels;
  auto part = [&](const Conv& own, int from, int to) {
    if (from >= to) return;
    rows_of(own, from);
    thread.out.clear();
    for (int k = 0; k < height; ++k)
      thread.out.push_back(reinterpret_cast<uint8_t*>(values + k * pitch + static_cast<size_t>(from - x0) * own.dst_channels));
    const CadyqTarget target{thread.out.data(), nullptr, 1, own.dst_channels, nullptr};
    const CadyqEpilogue e = epilogue(own, 0, nullptr, false);
    if (height > 1 && own.weights4.get()) {
      thread.in.push_back(thread.in.back());  // meets weights that are zero
      CadyqWinograd job{};
      job.rows = thread.in.data();
      job.height = height;
      job.width = to - from;
      job.c_in = own.c_in;
      job.c_out = own.c_out;
      job.weights = reinterpret_cast<const int16_t*>(own.weights4.get());
      job.epilogue = e;
      job.target = target;
      kernels_->winograd5(&job, thread.kernel.get());
      return;
    }
    convolve(own, 0, thread.in, height, to - from, e, target, thread);
  };
  if (node.layer->borders.empty()) {
    part(conv, x0, x1);
  } else {
    auto variant = [&](int i, int n) { return n == 1 ? 3 : i == 0 ? 1 : i == n - 1 ? 2 : 0; };
    const int row = variant(y, src.height);
    auto of = [&](int column) -> const Conv& {
      const int i = 4 * row + column;
      return i ? *node.layer->borders[i - 1] : conv;
    };
    const bool first = x0 == 0, last = x1 == src.width && src.width > 1;
    if (first) part(of(variant(0, src.width)), 0, 1);
    part(of(0), x0 + first, x1 - last);
    if (last) part(of(2), x1 - 1, x1);
  }
  for (int k = 0; k < height; ++k)
    for (int dy = 0; dy < r; ++dy) write(values + k * pitch, conv.dst_channels, y + k, dy);
}

// Part of a row of the enlarged picture on the last plane's grid; equation (16).
int16_t* Network::enlarged(const BaseData& base, const Image& in, int y, int x0, int x1, Thread& thread) const {
  const int channels = planes_[steps_[0].dst].channels, s = scale_;
  const int first = x0 / s, last = (x1 + s - 1) / s, n = last - first;
  const size_t line = static_cast<size_t>(n + 4) * channels, row = static_cast<size_t>(in.width) * channels;
  double* sums = reinterpret_cast<double*>(thread.base.reserve((row + line) * sizeof(double) + static_cast<size_t>(n) * s * channels * 2));
  double* padded = sums + row;
  int16_t* out = reinterpret_cast<int16_t*>(padded + line);
  const int32_t* weight = base.weight.data() + y % s * 5;
  const double gain = in.wide ? base.gain16 : base.gain8;
  // Only the columns that are read, but no fewer than the border's mirror images need.
  const int low = std::max(0, first - 4), high = std::min(in.width, last + 4);
  const size_t shift = static_cast<size_t>(low) * channels, count = static_cast<size_t>(high - low) * channels;
  auto sum_rows = [&](const auto* data) {
    const std::remove_reference_t<decltype(*data)>* rows[5];
    for (int k = 0; k < 5; ++k) rows[k] = data + outside(y / s + k - 2, in.height, base.symmetric) * row + shift;
    vertical(rows, weight, count, sums + shift);
  };
  if (in.wide)
    sum_rows(static_cast<const uint16_t*>(in.data));
  else
    sum_rows(static_cast<const uint8_t*>(in.data));
  for (int i = 0; i < n + 4; ++i)
    std::memcpy(padded + static_cast<size_t>(i) * channels,
                sums + static_cast<size_t>(outside(first + i - 2, in.width, base.symmetric)) * channels,
                channels * sizeof(double));
  for (int phase = 0; phase < s; ++phase) {
    const int32_t* w = base.weight.data() + phase * 5;
    for (int i = 0; i < n; ++i)
      for (int c = 0; c < channels; ++c) {
        const double* p = padded + static_cast<size_t>(i) * channels + c;
        double sum = 0;  // exact, so the order does not matter
        for (int k = 0; k < 5; ++k) sum += w[k] * p[k * channels];
        const double v = std::min(std::max(sum * gain, -32768.0), 32767.0);
        out[(static_cast<size_t>(i) * s + phase) * channels + c] = static_cast<int16_t>(std::lrint(v));
      }
  }
  return out + static_cast<size_t>(x0 - first * s) * channels;
}

}  // namespace cadyq
