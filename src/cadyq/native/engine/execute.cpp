// Execution of a prepared plan: what groups (groups.cpp) and blocks (blocks.cpp) have in common.
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

// Work that a block of two layers has with a region: with its hidden ring, in rounds of the kernels.
long region_work(int height, int width, const CadyqKernels& kernels) {
  const int rows = kernels.round_rows, columns = kernels.round_columns;
  auto area = [&](int h, int w) { return static_cast<long>((h + rows - 1) / rows) * ((w + columns - 1) / columns); };
  return area(height, width) + area(height + 2, width + 2);
}

constexpr int kFixedTile = 16;  // of a plan without choices, whose regions are made of them

// Side of the working tiles of a plan without choices whose regions are no larger: the least work.
int fixed_tile(int height, int width, const CadyqKernels& kernels) {
  int best = 64;
  long least = -1;
  for (int t = kernels.least_tile; t <= kernels.most_tile; t += 2) {
    long work = 0;
    for (int y = 0; y < height; y += t)
      for (int x = 0; x < width; x += t) work += region_work(std::min(t, height - y), std::min(t, width - x), kernels);
    if (least < 0 || work < least) {
      least = work;
      best = t;
    }
  }
  return best;
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
  if (fixed && !rolls_) {
    resize(in, pool.threads(), fixed_tile(in.height, in.width, *kernels_), {});
    most_ = {};
  } else {
    const int tile = fixed ? kFixedTile : plan_tile_;
    resize(in, pool.threads(), tile, largest_sides(tile));
    most_ = balanced_;
  }
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
  if (!dynamic_) find_regions(-1, exited, {});
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

CadyqEpilogue Network::epilogue(const Conv& conv, int k, const Conv* next, bool rectify) const {
  CadyqEpilogue e{};
  e.factor = conv.factor[k].data();
  e.bias = conv.bias.data();
  e.slope = conv.slope.empty() ? nullptr : conv.slope.data();
  e.slopes = conv.slopes;
  e.store = CADYQ_INT16;
  e.gain = conv.levels ? conv.gain.data() : nullptr;
  e.levels = static_cast<float>(conv.levels);
  e.rectify = rectify;
  if (next) {
    e.store = next->store;
    e.quantizer = next->quantizer[0];
    e.quantizer.multiplier = conv.requant[0].data();
    e.quantizer.covers = conv.covers;
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
  job.weight_bytes = conv.weight_bytes;
  job.is_signed = !conv.raw && !conv.quantizer[k].is_unsigned;
  job.c_out = conv.c_out;
  job.weights = conv.weights.get();
  job.init = conv.init[k].data();
  job.epilogue = epilogue;
  job.target = target;
  kernels_->direct(&job, thread.kernel.get());
}

// Brings all tiles of a plane into its first buffer.
void Network::settle(int plane) {
  Store& s = stores_[plane];
  int16_t* home = s.memory[0];
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

// Columns of rows [y0, y1) at `level` times the input's resolution that lie at most `margin` beyond computed tiles.
void Network::spans(int y0, int y1, int level, int margin, std::vector<Span>& out) const {
  out.clear();
  const int side = tile_ * level, width = width_ * level;
  if (!exited_) {
    out.push_back({0, width});
    return;
  }
  const int first = std::max(0, y0 - margin) / side, last = std::min(height_ * level - 1, y1 - 1 + margin) / side;
  for (int c = 0; c < columns_; ++c) {
    bool any = false;
    for (int r = first; r <= last; ++r) any |= !exited_[r * columns_ + c];
    if (!any) continue;
    const int x0 = std::max(0, c * side - margin), x1 = std::min(width, (c + 1) * side + margin);
    if (!out.empty() && x0 <= out.back().x1)
      out.back().x1 = x1;
    else
      out.push_back({x0, x1});
  }
}

// Sides of regions, in tiles, that occupy all threads for the shortest time where all tiles are computed alike: few large
// regions save rings, but may leave a thread without work in the end.
Sides Network::balanced_sides(int threads, const Sides& largest) const {
  const int least = (kernels_->least_tile + tile_ - 1) / tile_;
  constexpr int kFew = 1024;  // tiles; with more, the end of a block does not matter
  Sides best = largest;
  if (threads == 1 || rows_ * columns_ > kFew) return best;
  long shortest = -1;
  for (int r = largest.rows; r >= std::min(largest.rows, least); --r)
    for (int c = largest.columns; c >= std::min(largest.columns, least); --c) {
      std::vector<long> work, busy(threads, 0);
      for (int y = 0; y < height_; y += r * tile_)
        for (int x = 0; x < width_; x += c * tile_)
          work.push_back(region_work(std::min(r * tile_, height_ - y), std::min(c * tile_, width_ - x), *kernels_));
      std::sort(work.rbegin(), work.rend());
      for (long each : work) *std::min_element(busy.begin(), busy.end()) += each;
      const long time = *std::max_element(busy.begin(), busy.end());
      if (shortest < 0 || time < shortest) {
        shortest = time;
        best = {r, c};
      }
    }
  return best;
}

// Cuts the tiles into regions: exited ones each for itself; others are merged that a block computes alike.
void Network::find_regions(int block, const uint8_t* exited, const Choices& choices) {
  regions_.clear();
  const Region all{0, 0, rows_, columns_};
  auto key = [&](int t) {
    if (exited[t]) return -1;
    if (block < 0) return 0;
    const StepData& step = steps_[block];
    const bool from_second = stores_[step.src].tiles[t] != stores_[step.src].memory[0];
    const int first = blocks_[block].chooses_first ? choices.choice[choices.at(t, 0)] : 0;
    return (first * 2 + from_second) * 2 + is_second(step, t);
  };
  merge(all, block >= 0 && blocks_[block].own_range ? Sides{} : most_, key, regions_);
  for_tiles(all, [&](int t) {
    if (exited[t]) regions_.push_back(tile_region(t));
  });
}

}  // namespace cadyq
