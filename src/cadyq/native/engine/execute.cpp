// Execution of a prepared plan: groups of layers by strips of rows, blocks tile by tile.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "network.h"

namespace cadyq {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int16_t clamp16(float v) {
  return static_cast<int16_t>(std::lrintf(std::min(std::max(v, -32768.f), 32767.f)));
}

// Side of the working tiles of a plan without choices: the least work, hidden ring and rounding to 4x4 included.
int fixed_tile(int height, int width) {
  int best = 64;
  long least = -1;
  for (int t = 56; t <= 80; t += 2) {
    long work = 0;
    for (int y = 0; y < height; y += t)
      for (int x = 0; x < width; x += t) {
        const long h = std::min(t, height - y), w = std::min(t, width - x);
        work += ((h + 3) / 4) * ((w + 3) / 4) + ((h + 5) / 4) * ((w + 5) / 4);
      }
    if (least < 0 || work < least) {
      least = work;
      best = t;
    }
  }
  return best;
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

// Equation (1): sums of |dx| and |dy| of the grey image's Sobel derivatives, per tile of one row of tiles.
template <class T>
void gradient_rows(const Image& in, int channels, int tile, int tile_row, int columns, int64_t* out) {
  const T* data = static_cast<const T*>(in.data);
  auto grey = [&](int y, int x) -> int64_t {
    y = std::min(std::max(y, 0), in.height - 1);
    x = std::min(std::max(x, 0), in.width - 1);
    const T* p = data + (static_cast<size_t>(y) * in.width + x) * channels;
    if (channels != 3) return int64_t{p[0]} * 65536;
    return int64_t{19595} * p[0] + int64_t{38470} * p[1] + int64_t{7471} * p[2];
  };
  const int y1 = std::min(in.height, (tile_row + 1) * tile);
  for (int y = tile_row * tile; y < y1; ++y) {
    // Columns of the 3x3 window: weighted sum and difference of the three rows; they slide along x.
    int64_t s[3], d[3];
    auto column = [&](int x, int i) {
      const int64_t a = grey(y - 1, x), b = grey(y, x), c = grey(y + 1, x);
      s[i] = a + 2 * b + c;
      d[i] = c - a;
    };
    column(-1, 0);
    column(0, 1);
    for (int x = 0; x < in.width; ++x) {
      column(x + 1, 2);
      int64_t* o = out + (static_cast<size_t>(tile_row) * columns + x / tile) * 2;
      o[0] += std::abs(s[2] - s[0]);
      o[1] += std::abs(d[0] + 2 * d[1] + d[2]);
      s[0] = s[1], s[1] = s[2];
      d[0] = d[1], d[1] = d[2];
    }
  }
}

}  // namespace

void Network::gradients(Pool& pool, const Image& in) {
  const int channels = planes_[steps_[0].dst].channels;
  std::vector<int64_t>& sums = gradient_sums_;
  sums.assign(gradients_.size(), 0);
  pool.run(rows_, [&](int r, int) {
    if (in.wide)
      gradient_rows<uint16_t>(in, channels, tile_, r, columns_, sums.data());
    else
      gradient_rows<uint8_t>(in, channels, tile_, r, columns_, sums.data());
  });
  const double unit = static_cast<double>(8 * 65536) * (in.wide ? 65535.0 : 255.0);
  for (int r = 0; r < rows_; ++r)
    for (int c = 0; c < columns_; ++c) {
      const int h = std::min(tile_, height_ - r * tile_), w = std::min(tile_, width_ - c * tile_);
      const double n = static_cast<double>(h) * w;
      for (int i = 0; i < 2; ++i) {
        const size_t at = (static_cast<size_t>(r) * columns_ + c) * 2 + i;
        gradients_[at] = static_cast<double>(sums[at]) / (unit * n);
      }
    }
}

void Network::run(Pool& pool, const Image& in, void* out, const int8_t* forced, const uint8_t* exited, uint8_t* bits,
                  int8_t* choice) {
  // Where nothing is chosen, tiles are only a matter of speed: larger ones recompute less of each other's hidden ring.
  const int rows = (in.height + plan_tile_ - 1) / plan_tile_, columns = (in.width + plan_tile_ - 1) / plan_tile_;
  const bool some = std::any_of(exited, exited + rows * columns, [](uint8_t e) { return e != 0; });
  const bool fixed = !dynamic_ && !some;
  exited_ = some ? exited : nullptr;
  resize(in, pool.threads(), fixed ? fixed_tile(in.height, in.width) : plan_tile_);
  if (fixed) {
    for (int t = 0; t < rows * columns; ++t)
      for (int s = 0; s < n_sites_; ++s) {
        bits[t * n_sites_ + s] = static_cast<uint8_t>(site_bits_[s]);
        choice[t * n_sites_ + s] = 0;
      }
    const size_t n = static_cast<size_t>(rows_) * columns_ * n_sites_;
    free_.assign(n, -1);
    none_.assign(static_cast<size_t>(rows_) * columns_, 0);
    own_bits_.resize(n);
    own_choice_.resize(n);
    forced = free_.data();
    exited = none_.data();
    bits = own_bits_.data();
    choice = own_choice_.data();
  }
  for (auto& p : profile_) p.second = 0;
  if (dynamic_) gradients(pool, in);
  for (Segment& s : segments_) {
    if (s.block < 0) {
      run_group(pool, s.group, in, out);
      continue;
    }
    const double start = now();
    run_block(pool, s, forced, exited, bits, choice);
    profile_[s.profile].second += now() - start;
  }
}

// ---- convolutions -----------------------------------------------------------------------------------------------

CadyqEpilogue Network::epilogue(const Conv& conv, int k, const Conv* next) const {
  CadyqEpilogue e{};
  e.factor = conv.factor[k].data();
  e.bias = conv.bias.data();
  e.slope = conv.slope.empty() ? nullptr : conv.slope.data();
  e.store = CADYQ_INT16;
  if (next) {
    e.store = next->store;
    e.quantizer = next->quantizer[0];
    e.quantizer.multiplier = conv.requant[0].data();
  }
  return e;
}

void Network::convolve(const Conv& conv, int k, const std::vector<const uint8_t*>& rows, int height, int width,
                       const CadyqEpilogue& epilogue, const CadyqTarget& target, Thread& thread) const {
  if (conv.kind == Conv::kWinograd) {
    CadyqWinograd job{};
    job.rows = rows.data();
    job.height = height;
    job.width = width;
    job.c_in = conv.c_in;
    job.c_out = conv.c_out;
    job.is_unsigned = conv.quantizer[k].is_unsigned;
    job.weights = reinterpret_cast<const int16_t*>(conv.weights.get());
    job.epilogue = epilogue;
    job.target = target;
    kernels_->winograd(&job, thread.kernel.get());
    return;
  }
  CadyqDirect job{};
  job.rows = rows.data();
  job.height = height;
  job.width = width;
  job.kernel = conv.kernel;
  job.pixel_bytes = conv.pixel_bytes();
  job.run_bytes = conv.kernel * conv.pixel_bytes();
  job.element = conv.element;
  job.c_out = conv.c_out;
  job.weights = conv.weights.get();
  job.init = conv.init[k].data();
  job.epilogue = epilogue;
  job.target = target;
  kernels_->direct(&job, thread.kernel.get());
}

// ---- groups -----------------------------------------------------------------------------------------------------

void Network::quantize_row(const Store& plane, int y, int x0, int x1, uint8_t* dst, const CadyqQuantizer& q,
                           int store) const {
  const int element = store == CADYQ_CODE8 ? 1 : 2;
  for (int x = x0; x < x1;) {
    const int column = x / tile_, end = std::min(x1, (column + 1) * tile_);
    const int16_t* base = plane.tiles[static_cast<size_t>(y / tile_) * columns_ + column];
    kernels_->quantize(base + (static_cast<size_t>(y) * plane.width + x) * plane.channels,
                       dst + static_cast<size_t>(x - x0) * plane.channels * element, end - x, plane.channels, &q, store);
    x = end;
  }
}

// The int16 values of one row, as they are.
void Network::copy_row(const Store& plane, int y, uint8_t* dst) const {
  for (int x = 0; x < width_;) {
    const int column = x / tile_, end = std::min(width_, (column + 1) * tile_);
    const int16_t* base = plane.tiles[static_cast<size_t>(y / tile_) * columns_ + column];
    const size_t n = static_cast<size_t>(end - x) * plane.channels * sizeof(int16_t);
    std::memcpy(dst + static_cast<size_t>(x) * plane.channels * sizeof(int16_t),
                base + (static_cast<size_t>(y) * plane.width + x) * plane.channels, n);
    x = end;
  }
}

// Brings all tiles of a plane into its first buffer.
void Network::settle(int plane) {
  Store& s = stores_[plane];
  int16_t* home = reinterpret_cast<int16_t*>(s.memory[0].get());
  for (int r = 0; r < rows_; ++r)
    for (int c = 0; c < columns_; ++c) {
      const int16_t*& from = s.tiles[static_cast<size_t>(r) * columns_ + c];
      if (from == home) continue;
      const int x0 = c * tile_, n = std::min(tile_, width_ - x0) * s.channels;
      for (int y = r * tile_; y < std::min(height_, (r + 1) * tile_); ++y) {
        const size_t at = (static_cast<size_t>(y) * width_ + x0) * s.channels;
        std::memcpy(home + at, from + at, static_cast<size_t>(n) * 2);
      }
      from = home;
    }
}

// Whether anything computed tiles need lies in a region, given in pixels at `level` times the input's resolution.
bool Network::needed(int y0, int x0, int y1, int x1, int level, int margin) const {
  if (!exited_) return true;
  const int ty0 = std::max(0, y0 / level - margin) / tile_, ty1 = std::min(height_ - 1, (y1 - 1) / level + margin) / tile_;
  const int tx0 = std::max(0, x0 / level - margin) / tile_, tx1 = std::min(width_ - 1, (x1 - 1) / level + margin) / tile_;
  for (int y = ty0; y <= ty1; ++y)
    for (int x = tx0; x <= tx1; ++x)
      if (!exited_[y * columns_ + x]) return true;
  return false;
}

void Network::run_group(Pool& pool, Group& group, const Image& in, void* out) {
  for (const Node& node : group.nodes) {
    if (node.residual_plane >= 0) settle(node.residual_plane);
    if (node.dst_plane >= 0) {
      Store& s = stores_[node.dst_plane];
      std::fill(s.tiles.begin(), s.tiles.end(), reinterpret_cast<int16_t*>(s.memory[0].get()));
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
  const StepData& step = *node.step;
  View* dst = node.dst_view >= 0 ? group.views[node.dst_view].get() : nullptr;
  const View* src = node.src_view >= 0 ? group.views[node.src_view].get() : nullptr;
  if (node.kind == Node::kImageIn) {
    pool.run(to - from, [&](int i, int) {
      const int y = from + i;
      const size_t at = static_cast<size_t>(y) * in.width * dst->channels;
      int16_t* row = reinterpret_cast<int16_t*>(dst->row(y));
      if (in.wide)
        image_row(static_cast<const uint16_t*>(in.data) + at, in.width, dst->channels, step.multiplier16.data(),
                  step.offset.data(), row);
      else
        image_row(static_cast<const uint8_t*>(in.data) + at, in.width, dst->channels, step.multiplier8.data(),
                  step.offset.data(), row);
    });
    return;
  }
  const Conv& conv = *node.conv;
  if (node.kind == Node::kQuantize) {
    pool.run(to - from, [&](int i, int) {
      const int y = from + i;
      if (conv.raw && node.src_plane >= 0)
        copy_row(stores_[node.src_plane], y, dst->row(y));
      else if (conv.raw)
        std::memcpy(dst->row(y), src->row(y), static_cast<size_t>(src->width) * src->channels * sizeof(int16_t));
      else if (node.src_plane >= 0)
        quantize_row(stores_[node.src_plane], y, 0, width_, dst->row(y), conv.quantizer[0], conv.store);
      else
        kernels_->quantize(reinterpret_cast<const int16_t*>(src->row(y)), dst->row(y), src->width, src->channels,
                           &conv.quantizer[0], conv.store);
    });
    return;
  }
  if (node.kind == Node::kImageOut) {
    const StepData& end = steps_.back();
    const int channels = planes_[end.src].channels, width = src->width * conv.shuffle;
    const CadyqEpilogue e = epilogue(conv, 0, nullptr);
    const size_t sample = in.wide ? 2 : 1;
    const int level = src->height / height_, zoom = scale_ / level;
    auto write = [&](size_t at, int value) {
      if (in.wide)
        static_cast<uint16_t*>(out)[at] = end.table16[value + 32768];
      else
        static_cast<uint8_t*>(out)[at] = end.table8[value + 32768];
    };
    auto image_span = [&](int x0, int x1, int y, Thread& thread) {
      thread.in.clear();
      for (int r = 0; r < conv.kernel; ++r)
        thread.in.push_back(src->row(y - conv.pad + r) +
                            (static_cast<ptrdiff_t>(x0) - conv.pad) * static_cast<ptrdiff_t>(conv.pixel_bytes()));
      if (conv.kind == Conv::kColumns) {
        int32_t* acc = reinterpret_cast<int32_t*>(thread.rows_out.get());
        CadyqColumns job{thread.in.data(), x1 - x0,            conv.kernel,         conv.pixel_bytes(), conv.element,
                         conv.c_out,       conv.weights.get(), conv.init[0].data(), acc};
        kernels_->columns(&job, thread.kernel.get());
        size_t at = (static_cast<size_t>(y) * width + x0) * channels;
        for (int x = x0; x < x1; ++x, acc += 4)
          for (int c = 0; c < channels; ++c, ++at) {
            float v = static_cast<float>(acc[c]) * e.factor[c];
            v = v + e.bias[c];
            if (e.slope && v < 0) v = v * e.slope[c];
            write(at, clamp16(v));
          }
        return;
      }
      const int r = conv.shuffle, n = (x1 - x0) * r;
      const size_t pitch = static_cast<size_t>(n) * conv.dst_channels;
      int16_t* rows = reinterpret_cast<int16_t*>(thread.rows_out.reserve(pitch * r * 2));
      thread.out.clear();
      for (int d = 0; d < r; ++d) thread.out.push_back(reinterpret_cast<uint8_t*>(rows + d * pitch));
      convolve(conv, 0, thread.in, 1, x1 - x0, e, CadyqTarget{thread.out.data(), nullptr, r, conv.dst_channels}, thread);
      for (int d = 0; d < r; ++d) {
        size_t at = (static_cast<size_t>(y * r + d) * width + x0 * r) * channels;
        for (int x = 0; x < n; ++x)
          for (int c = 0; c < channels; ++c, ++at) write(at, rows[d * pitch + static_cast<size_t>(x) * conv.dst_channels + c]);
      }
    };
    pool.run(to - from, [&](int i, int t) {
      Thread& thread = threads_[t];
      const int y = from + i;
      if (exited_)
        std::memset(static_cast<uint8_t*>(out) + static_cast<size_t>(y) * zoom * width * channels * sample, 0,
                    static_cast<size_t>(zoom) * width * channels * sample);
      // Runs of tiles that were not exited; everything, where none was.
      for (int x0 = 0, x1; x0 < src->width; x0 = x1) {
        x1 = src->width;
        if (exited_) {
          const uint8_t* row = exited_ + static_cast<size_t>(y / level / tile_) * columns_;
          const int first = x0 / level / tile_;
          int last = first + 1;
          while (last < columns_ && row[last] == row[first]) ++last;
          x1 = std::min(src->width, last * tile_ * level);
          if (row[first]) continue;
        }
        image_span(x0, x1, y, thread);
      }
    });
    return;
  }
  // A convolution into a window or a plane, in bands of rows and pieces of columns.
  const bool winograd = conv.kind == Conv::kWinograd;
  const int band = winograd ? 4 : 1, round = 4 * kernels_->winograd_tiles;
  // Pieces of about five rounds: longer pipelines, and weights are read less often.
  const int length = exited_ ? 1 : 5;
  const int wanted = std::max(1, (src->width + length * round / 2) / (length * round));
  const int piece = winograd ? ((src->width + wanted - 1) / wanted + round - 1) / round * round : src->width;
  const int pieces = (src->width + piece - 1) / piece, bands = (to - from + band - 1) / band;
  const CadyqEpilogue e = epilogue(conv, 0, node.next);
  const int element = e.store == CADYQ_CODE8 ? 1 : 2, r = conv.shuffle;
  auto plane_row = [&](int plane, int y) {
    Store& s = stores_[plane];
    return s.memory[0].get() + static_cast<size_t>(y) * s.width * s.channels * 2;
  };
  pool.run(bands * pieces, [&](int i, int t) {
    Thread& thread = threads_[t];
    const int y0 = from + i / pieces * band, x0 = i % pieces * piece;
    const int height = std::min(band, to - y0), width = std::min(piece, src->width - x0);
    if (group.skips && !needed(y0, x0, y0 + height, x0 + width, src->height / height_, group.margin)) return;
    const size_t shift = static_cast<size_t>(x0) * conv.pixel_bytes() - static_cast<size_t>(conv.pad) * conv.pixel_bytes();
    const int n_in = (winograd ? 4 : height) + 2 * conv.pad;
    thread.in.clear();
    for (int y = 0; y < n_in; ++y) thread.in.push_back(src->row(y0 - conv.pad + y) + shift);
    thread.out.clear();
    thread.residual.clear();
    const size_t first = static_cast<size_t>(x0) * r * conv.dst_channels;
    for (int y = y0 * r; y < (y0 + height) * r; ++y) {
      uint8_t* row = node.dst_plane >= 0 ? plane_row(node.dst_plane, y) : dst->row(y);
      thread.out.push_back(row + first * element);
      if (node.residual_plane >= 0)
        thread.residual.push_back(reinterpret_cast<const int16_t*>(plane_row(node.residual_plane, y)) + first);
      else if (node.residual_view >= 0)
        thread.residual.push_back(reinterpret_cast<const int16_t*>(group.views[node.residual_view]->row(y)) + first);
    }
    const CadyqTarget target{thread.out.data(), thread.residual.empty() ? nullptr : thread.residual.data(), r,
                             conv.dst_channels};
    convolve(conv, 0, thread.in, height, width, e, target, thread);
  });
}

// ---- blocks, section 5 ------------------------------------------------------------------------------------------

// Equation (11): the same operations in the same order as the reference, so that choices agree everywhere.
static double logarithm(double x) {
  int exponent;
  double mantissa = std::frexp(x, &exponent);
  if (mantissa < 0.7071067811865476) {
    mantissa = mantissa + mantissa;
    --exponent;
  }
  const double t = (mantissa - 1.0) / (mantissa + 1.0), square = t * t;
  double series = 1.0 / 21.0;
  for (int k = 19; k > 0; k -= 2) series = series * square + 1.0 / k;
  return exponent * 0.6931471805599453 + (t + t) * series;
}

// Equations (9) and (10).
int Network::select(const SiteData& site, int tile, const int16_t* values, size_t pitch, int height, int width,
                    int channels, Thread& thread) const {
  const int inputs = static_cast<int>(site.weight.size() / site.bias.size()), c_real = inputs - 2;
  int64_t *sum = thread.sums.data(), *squares = sum + thread.sums.size() / 2;
  std::fill(thread.sums.begin(), thread.sums.end(), 0);
  kernels_->sums(values, pitch, height, width, channels, sum, squares);
  const int64_t n = static_cast<int64_t>(height) * width;
  const double pairs = static_cast<double>(n * (n - 1));
  double* input = thread.inputs.data();
  input[0] = gradients_[static_cast<size_t>(tile) * 2];
  input[1] = gradients_[static_cast<size_t>(tile) * 2 + 1];
  for (int c = 0; c < c_real; ++c) {
    const int64_t spread = n * squares[c] - sum[c] * sum[c];
    input[2 + c] = n == 1 ? 0.0 : std::sqrt(static_cast<double>(spread) / pairs) * site.step;
  }
  if (site.log_offset > 0)
    for (int i = 0; i < inputs; ++i) input[i] = logarithm(input[i] + site.log_offset);
  int best = 0;
  double best_score = 0;
  for (size_t k = 0; k < site.bias.size(); ++k) {
    const double* w = site.weight.data() + k * inputs;
    double score = site.bias[k];
    for (int i = 0; i < inputs; ++i) score = score + w[i] * input[i];
    if (k == 0 || score > best_score) {
      best = static_cast<int>(k);
      best_score = score;
    }
  }
  return best;
}

void Network::run_block(Pool& pool, const Segment& segment, const int8_t* forced, const uint8_t* exited, uint8_t* bits,
                        int8_t* choice) {
  const StepData& step = steps_[segment.block];
  Store& dst = stores_[step.dst];
  // Tiles that stay as they are keep pointing at the source's values, unless those will be overwritten.
  pool.run(rows_ * columns_, [&](int t, int thread) {
    const int r = t / columns_, c = t % columns_;
    const Tile tile{t, r * tile_, c * tile_, std::min(height_, (r + 1) * tile_), std::min(width_, (c + 1) * tile_)};
    const size_t at = static_cast<size_t>(t) * n_sites_ + segment.first_site;
    const size_t n = block_convs_[segment.block].size();
    std::fill(bits + at, bits + at + n, 0);
    std::fill(choice + at, choice + at + n, -1);
    dst.next[t] = nullptr;
    if (!exited[t]) run_tile(segment, tile, threads_[thread], forced + at, bits + at, choice + at);
    if (dst.next[t]) return;
    const Store& src = stores_[step.src];
    bool overwritten = false;
    for (size_t i = segment.block; i < steps_.size(); ++i) overwritten = overwritten || steps_[i].dst == step.src;
    if (step.add_source && (step.src == step.dst || !overwritten)) {
      dst.next[t] = src.tiles[t];
      return;
    }
    int16_t* to = reinterpret_cast<int16_t*>(dst.memory[0].get());
    if (dst.two && to == src.tiles[t]) to = reinterpret_cast<int16_t*>(dst.memory[1].get());
    for (int y = tile.y0; y < tile.y1; ++y) {
      const size_t offset = (static_cast<size_t>(y) * width_ + tile.x0) * dst.channels;
      const size_t bytes = static_cast<size_t>(tile.x1 - tile.x0) * dst.channels * 2;
      if (step.add_source)
        std::memcpy(to + offset, src.tiles[t] + offset, bytes);
      else
        std::memset(to + offset, 0, bytes);
    }
    dst.next[t] = to;
  });
  dst.tiles.swap(dst.next);
}

void Network::run_tile(const Segment& segment, Tile tile, Thread& thread, const int8_t* forced, uint8_t* bits,
                       int8_t* choice) {
  const StepData& step = steps_[segment.block];
  const auto& convs = block_convs_[segment.block];
  const Store& src = stores_[step.src];
  Store& dst = stores_[step.dst];
  int halo = 0;
  for (const Conv* c : convs) halo += c->pad;
  const bool at_border =
      tile.y0 < halo || tile.x0 < halo || tile.y1 + halo > height_ || tile.x1 + halo > width_;

  // The values about to be quantised: first the source plane, then the hidden region with its own geometry.
  const int16_t* values = nullptr;
  size_t values_pitch = 0;
  int values_y0 = 0, values_x0 = 0;
  bool coded = false;  // the convolution before has written the codes already

  for (size_t i = 0; i < convs.size(); ++i) {
    const Conv& conv = *convs[i];
    const SiteData& site = *conv.site;
    const int y0 = tile.y0, x0 = tile.x0, inner_h = tile.y1 - y0, inner_w = tile.x1 - x0;
    const size_t pixel = conv.pixel_bytes();
    const size_t pitch = (static_cast<size_t>(inner_w) + 2 * halo + 8) * pixel;
    uint8_t* codes = thread.codes[i & 1].get();
    auto code_at = [&](int y, int x) {
      return codes + static_cast<size_t>(y - (y0 - halo)) * pitch + static_cast<size_t>(x - (x0 - halo)) * pixel;
    };
    // Region to be quantised; beyond the image the codes are zero.
    const int qy0 = std::max(0, y0 - halo), qy1 = std::min(height_, tile.y1 + halo);
    const int qx0 = std::max(0, x0 - halo), qx1 = std::min(width_, tile.x1 + halo);
    int k = 0;
    if (!coded) {
      if (forced[i] >= 0) {
        k = forced[i];
      } else if (site.bits.size() > 1) {
        const int channels = i == 0 ? src.channels : conv.c_in;
        const int16_t* inner;
        size_t inner_pitch;
        if (i == 0) {
          inner = src.tiles[tile.index] + (static_cast<size_t>(y0) * width_ + x0) * channels;
          inner_pitch = static_cast<size_t>(width_) * channels * 2;
        } else {
          inner = values + ((y0 - values_y0) * values_pitch / 2 + static_cast<size_t>(x0 - values_x0) * channels);
          inner_pitch = values_pitch;
        }
        k = select(site, tile.index, inner, inner_pitch, inner_h, inner_w, channels, thread);
      }
      choice[i] = static_cast<int8_t>(k);
      if (site.bits[k] == 0) return;
      if (at_border) std::memset(codes, conv.quantizer[k].flip, pitch * (inner_h + 2 * halo + 6));
      for (int y = qy0; y < qy1; ++y) {
        if (i == 0)
          quantize_row(src, y, qx0, qx1, code_at(y, qx0), conv.quantizer[k], conv.store);
        else
          kernels_->quantize(values + (y - values_y0) * values_pitch / 2 + static_cast<size_t>(qx0 - values_x0) * conv.c_in,
                             code_at(y, qx0), qx1 - qx0, conv.c_in, &conv.quantizer[k], conv.store);
      }
    }
    choice[i] = static_cast<int8_t>(k);
    bits[i] = static_cast<uint8_t>(site.bits[k]);

    const int reach = halo - conv.pad;  // of what this convolution produces
    const int oy0 = std::max(0, y0 - reach), oy1 = std::min(height_, tile.y1 + reach);
    const int ox0 = std::max(0, x0 - reach), ox1 = std::min(width_, tile.x1 + reach);
    const int height = oy1 - oy0, width = ox1 - ox0;
    const int n_in = (conv.kind == Conv::kWinograd ? (height + 3) / 4 * 4 : height) + 2 * conv.pad;
    thread.in.clear();
    for (int y = 0; y < n_in; ++y) thread.in.push_back(code_at(oy0 - conv.pad + y, ox0 - conv.pad));

    thread.out.clear();
    thread.residual.clear();
    const bool last = i + 1 == convs.size();
    const Conv* next = nullptr;
    if (last) {
      int16_t* to = reinterpret_cast<int16_t*>(dst.memory[0].get());
      if (dst.two && to == src.tiles[tile.index]) to = reinterpret_cast<int16_t*>(dst.memory[1].get());
      for (int y = oy0; y < oy1; ++y) {
        const size_t at = (static_cast<size_t>(y) * width_ + ox0) * dst.channels;
        thread.out.push_back(reinterpret_cast<uint8_t*>(to + at));
        if (step.add_source) thread.residual.push_back(src.tiles[tile.index] + at);
      }
      dst.next[tile.index] = to;
    } else if (convs[i + 1]->site->bits.size() == 1) {
      next = convs[i + 1];
      const size_t next_pixel = next->pixel_bytes(), next_pitch = (static_cast<size_t>(inner_w) + 2 * reach + 8) * next_pixel;
      uint8_t* to = thread.codes[(i + 1) & 1].get();
      if (at_border) std::memset(to, next->quantizer[0].flip, next_pitch * (inner_h + 2 * reach + 6));
      for (int y = oy0; y < oy1; ++y)
        thread.out.push_back(to + static_cast<size_t>(y - (y0 - reach)) * next_pitch +
                             static_cast<size_t>(ox0 - (x0 - reach)) * next_pixel);
    } else {
      values = reinterpret_cast<const int16_t*>(thread.hidden.get());
      values_pitch = static_cast<size_t>(width) * conv.dst_channels * 2;
      values_y0 = oy0;
      values_x0 = ox0;
      for (int y = 0; y < height; ++y) thread.out.push_back(thread.hidden.get() + y * values_pitch);
    }
    const CadyqTarget target{thread.out.data(), thread.residual.empty() ? nullptr : thread.residual.data(), 1,
                             conv.dst_channels};
    convolve(conv, k, thread.in, height, width, epilogue(conv, k, next), target, thread);
    coded = next != nullptr;
    halo = reach;
  }
}

}  // namespace cadyq
