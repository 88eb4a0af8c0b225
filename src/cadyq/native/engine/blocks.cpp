// Blocks, tile by tile; section 5.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "network.h"

namespace cadyq {

// std::frexp of a positive number, without a call for normal ones.
static double split(double x, int* exponent) {
  uint64_t word;
  std::memcpy(&word, &x, sizeof word);
  const int biased = static_cast<int>(word >> 52);
  if (biased < 1 || biased > 2046) return std::frexp(x, exponent);
  *exponent = biased - 1022;
  word = (word & 0x000fffffffffffff) | 0x3fe0000000000000;
  std::memcpy(&x, &word, sizeof word);
  return x;
}

// Equation (10a): the same operations in the same order as the reference, so that choices agree everywhere. All of a
// tile's inputs at once, as one alone would wait for itself at every step of the series.
static void take_logarithms(double* x, int n) {
  constexpr int kTogether = 16;
  for (int first = 0; first < n; first += kTogether) {
    const int count = std::min(kTogether, n - first);
    double exponent[kTogether], t[kTogether], series[kTogether];
    for (int i = 0; i < count; ++i) {
      int e;
      double mantissa = split(x[first + i], &e);
      if (mantissa < 0.7071067811865476) {
        mantissa = mantissa + mantissa;
        --e;
      }
      exponent[i] = e;
      t[i] = (mantissa - 1.0) / (mantissa + 1.0);
      series[i] = 1.0 / 21.0;
    }
    for (int k = 19; k > 0; k -= 2) {
      const double term = 1.0 / k;
      for (int i = 0; i < count; ++i) series[i] = series[i] * (t[i] * t[i]) + term;
    }
    for (int i = 0; i < count; ++i) x[first + i] = exponent[i] * 0.6931471805599453 + (t[i] + t[i]) * series[i];
  }
}

// Equations (9) and (10), from the sums of the site's channels.
int Network::select(const SiteData& site, int tile, int64_t n, Thread& thread) const {
  const int inputs = static_cast<int>(site.weight.size() / site.bias.size()), c_real = inputs - 2;
  const int64_t *sum = thread.sums.data(), *squares = sum + thread.sums.size() / 4;
  const double pairs = static_cast<double>(n * (n - 1));
  double* input = thread.inputs.data();
  input[0] = gradients_[static_cast<size_t>(tile) * 2];
  input[1] = gradients_[static_cast<size_t>(tile) * 2 + 1];
  for (int c = 0; c < c_real; ++c) {
    const int64_t spread = n * squares[c] - sum[c] * sum[c];
    input[2 + c] = n == 1 ? 0.0 : std::sqrt(static_cast<double>(spread) / pairs) * site.step;
  }
  if (site.log_offset > 0) {
    for (int i = 0; i < inputs; ++i) input[i] = input[i] + site.log_offset;
    take_logarithms(input, inputs);
  }
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

// Multipliers and factors of candidate k from the largest magnitudes; equation (15).
void Network::own_range(const Conv& conv, int k, Thread& thread) const {
  const SiteData& site = *conv.site;
  double clip = 0;
  for (size_t c = 0; c < site.inverse_scale.size(); ++c)
    clip = std::max(clip, static_cast<double>(thread.largest[c]) * site.inverse_scale[c]);
  if (clip == 0) clip = 1;
  const double levels = std::max(site.high[k], 1);
  std::fill(thread.multiplier.begin(), thread.multiplier.end(), 0.f);
  for (size_t c = 0; c < site.inverse_scale.size(); ++c)
    thread.multiplier[c] = static_cast<float>(std::min(levels * site.inverse_scale[c] / clip, 65000.0));
  for (size_t o = 0; o < conv.factor[k].size(); ++o)
    thread.factor[o] = static_cast<float>(static_cast<double>(conv.factor[k][o]) * clip / levels);
  thread.clip = clip;
}

// What becomes of a tile that a block does not compute: its input, or zeros where nothing is added to it.
void Network::keep(const StepData& step, int tile) {
  const Store& src = stores_[step.src];
  Store& dst = stores_[step.dst];
  if (step.residual && step.src == step.dst) {  // the values stay where they are
    dst.next[tile] = src.tiles[tile];
    return;
  }
  int16_t* to = dst.memory[is_second(step, tile)];
  const Box box = pixels(tile_region(tile));
  for (int y = box.y0; y < box.y1; ++y) {
    const size_t offset = (static_cast<size_t>(y) * width_ + box.x0) * dst.channels;
    const size_t bytes = static_cast<size_t>(box.width()) * dst.channels * 2;
    if (step.residual)
      std::memcpy(to + offset, src.tiles[tile] + offset, bytes);
    else
      std::memset(to + offset, 0, bytes);
  }
  dst.next[tile] = to;
}

// Tiles that have chosen alike so far, through the layers of a block, as one. Where they choose differently, the rest of
// the layers is run for each part; what the layers before have left in the thread's buffers serves all of them.
// Everything is clipped to the picture; beyond it, codes are zero.
class RegionRun {
 public:
  RegionRun(Network& network, const StepData& step, const BlockPlan& block, const Network::Choices& choices,
            const Region& region, Network::Thread& thread)
      : n_(network),
        step_(step),
        block_(block),
        choices_(choices),
        region_(region),
        first_tile_(region.row0 * network.columns_ + region.column0),
        box_(network.pixels(region)),
        thread_(thread),
        at_border_(box_.y0 < block_.halo || box_.x0 < block_.halo || box_.y1 + block_.halo > n_.height_ ||
                   box_.x1 + block_.halo > n_.width_) {}

  // Enters what each tile chooses at layer i into the table; returns whether all choose the same. `source` says where
  // tiles of the block's source are.
  bool choose(size_t i) { return choose(i, n_.stores_[step_.src].tiles); }
  bool choose(size_t i, const std::vector<const int16_t*>& source) {
    const Layer& layer = block_.layers[i];
    if (layer.column < 0) return true;
    bool same = true;
    n_.for_tiles(region_, [&](int t) {
      const size_t at = choices_.at(t, layer.column);
      const int k = choices_.forced[at];
      choices_.choice[at] = static_cast<int8_t>(k >= 0 ? k : chosen(layer, t, source[t]));
      same &= choices_.choice[at] == choices_.choice[choices_.at(first_tile_, layer.column)];
    });
    return same;
  }

  // Layers from i on, at which all tiles have chosen the same.
  void run(size_t i) {
    Store& dst = n_.stores_[step_.dst];
    for (;;) {
      const Layer& layer = block_.layers[i];
      const Conv& conv = *layer.conv;
      const bool coded = i > 0 && block_.layers[i - 1].fused;  // the layer before has written the codes already
      int k = 0;
      if (layer.column >= 0) k = choices_.choice[choices_.at(first_tile_, layer.column)];
      enter_bits(layer, k);
      if (conv.site->bits[k] == 0) return;
      if (i == 0) first_choice_ = k;
      if (conv.own_range()) find_range(layer, k);
      if (conv.own_range() && i == 0) {
        first_clip_ = thread_.clip;
        thread_.first_multiplier.assign(thread_.multiplier.begin(), thread_.multiplier.end());
      }
      if (i == 0 && block_.rolls) return roll(k);
      if (!coded) {
        const Codes to = codes(layer, static_cast<int>(i));
        if (i == 0) first_codes_ = to;
        const bool whole = n_.is_whole(layer.data->src);
        const Box box = around(layer.out + conv.pad);
        if (at_border_ || !whole) clear(to, layer, conv.quantizer[k].flip, whole ? box : Box{});
        quantize(layer, to, k, box);
      }
      const bool last = i + 1 == block_.layers.size();
      // A second buffer is needed where the source is updated: neighbors read the old values.
      int16_t* to = dst.memory[n_.is_second(step_, first_tile_)];
      convolve(layer, static_cast<int>(i), k, around(layer.out), last ? to : nullptr);
      if (last) {
        n_.for_tiles(region_, [&](int t) { dst.next[t] = to; });
        return;
      }
      ++i;
      if (!choose(i)) break;
    }
    const int column = block_.layers[i].column;
    std::vector<Region>& parts = thread_.parts;
    const size_t first = parts.size();
    n_.merge(region_, n_.most_, [&](int t) { return choices_.choice[choices_.at(t, column)]; }, parts);
    for (size_t p = first; p < parts.size(); ++p) RegionRun(*this, parts[p]).run(i);
    parts.resize(first);
  }

 private:
  RegionRun(const RegionRun& whole, const Region& part)
      : RegionRun(whole.n_, whole.step_, whole.block_, whole.choices_, part, whole.thread_) {
    first_choice_ = whole.first_choice_;
    first_codes_ = whole.first_codes_;
  }

  Box around(int margin) const {
    return {std::max(0, box_.y0 - margin), std::max(0, box_.x0 - margin), std::min(n_.height_, box_.y1 + margin),
            std::min(n_.width_, box_.x1 + margin)};
  }
  bool is_source(int plane) const { return plane == step_.src; }
  // Calls f(values, x, pixels) for the pieces of a row; values are those of channel 0.
  template <class F>
  void for_row(int plane, int y, int x0, int x1, const F& f) const {
    if (is_source(plane))
      n_.for_pieces(n_.stores_[plane], y, x0, x1, f);
    else
      f(thread_.values[plane].at(y, x0), x0, x1 - x0);
  }
  int stride(int plane) const { return is_source(plane) ? n_.stores_[plane].channels : thread_.values[plane].channels; }

  // Enters the bits of a layer's candidate k into the table.
  void enter_bits(const Layer& layer, int k) {
    if (layer.column < 0) return;
    const uint8_t bits = static_cast<uint8_t>(layer.conv->site->bits[k]);
    n_.for_tiles(region_, [&](int t) { choices_.bits[choices_.at(t, layer.column)] = bits; });
  }

  int chosen(const Layer& layer, int tile, const int16_t* source) {
    const SiteData& site = *layer.conv->site;
    if (site.bits.size() == 1) return 0;
    const Box box = n_.pixels(n_.tile_region(tile));
    const size_t room = thread_.sums.size() / 4;
    int64_t *sum = thread_.sums.data(), *own = sum + 2 * room;
    std::fill(thread_.sums.begin(), thread_.sums.end(), 0);
    const bool whole = n_.is_whole(layer.data->src);
    int offset = 0;
    for (const PartData& p : layer.data->src) {
      const int channels = stride(p.plane);
      const int16_t* values;
      size_t width;
      if (is_source(p.plane)) {
        width = n_.width_;
        values = source + (box.y0 * width + box.x0) * channels;
      } else {
        width = thread_.values[p.plane].box.width();
        values = thread_.values[p.plane].at(box.y0, box.x0);
      }
      int64_t* to = whole ? sum : own;
      if (!whole) std::fill(own, own + 2 * room, 0);
      n_.kernels_->sums(values, width * channels * 2, box.height(), box.width(), channels, to, to + room);
      if (whole) break;
      std::copy_n(own + p.first, p.channels, sum + offset);
      std::copy_n(own + room + p.first, p.channels, sum + room + offset);
      offset += p.channels;
    }
    return n_.select(site, tile, static_cast<int64_t>(box.height()) * box.width(), thread_);
  }

  // Of one tile: regions are no larger where this is needed.
  void find_range(const Layer& layer, int k) {
    std::fill(thread_.largest.begin(), thread_.largest.end(), 0);
    int offset = 0;
    for (const PartData& p : layer.data->src) {
      const int channels = stride(p.plane);
      int32_t* most = thread_.largest.data() + offset;
      for (int y = box_.y0; y < box_.y1; ++y)
        for_row(p.plane, y, box_.x0, box_.x1, [&](const int16_t* v, int, int n) {
          for (const int16_t* end = v + static_cast<size_t>(n) * channels; v < end; v += channels)
            for (int c = 0; c < p.channels; ++c) most[c] = std::max(most[c], std::abs(static_cast<int32_t>(v[p.first + c])));
        });
      offset += p.channels;
    }
    n_.own_range(*layer.conv, k, thread_);
  }

  // The codes of layer i: rows of a buffer that begins `margin` pixels above and left of the region. Where layers roll, as
  // many rows as a window holds in turn, behind one that is empty.
  struct Codes {
    uint8_t* data;
    size_t pitch, pixel;
    int y0, x0;
    int window;  // 0: all rows
    uint8_t* at(int y, int x) const {
      const int row = window ? 1 + (y - y0) % window : y - y0;
      return data + row * pitch + (x - x0) * pixel;
    }
  };
  Codes codes(const Layer& layer, int i) const {
    const int margin = layer.out + layer.conv->pad;
    const size_t pixel = layer.conv->pixel_bytes();
    return {thread_.codes[i & 1].get(), (static_cast<size_t>(box_.width()) + 2 * margin + 8) * pixel, pixel,
            box_.y0 - margin, box_.x0 - margin, block_.rolls ? roll_rows(box_.height(), box_.width()) + kRollMore : 0};
  }
  // All but a box that lies within the codes and is written afterwards.
  void clear(const Codes& c, const Layer& layer, uint8_t zero, const Box& box) const {
    const int margin = layer.out + layer.conv->pad, rows = box_.height() + 2 * margin + 6;
    for (int i = 0; i < rows; ++i) {
      uint8_t* row = c.data + i * c.pitch;
      const int y = c.y0 + i;
      if (y < box.y0 || y >= box.y1) {
        std::memset(row, zero, c.pitch);
        continue;
      }
      clear_sides(c, row, zero, box);
    }
  }
  // The columns of a row that lie beside a box.
  void clear_sides(const Codes& c, uint8_t* row, uint8_t zero, const Box& box) const {
    const size_t first = (box.x0 - c.x0) * c.pixel, last = (box.x1 - c.x0) * c.pixel;
    std::memset(row, zero, first);
    std::memset(row + last, zero, c.pitch - last);
  }

  void quantize(const Layer& layer, const Codes& to, int k, const Box& box) {
    const Conv& conv = *layer.conv;
    const bool whole = n_.is_whole(layer.data->src);
    int offset = 0;
    for (const PartData& p : layer.data->src) {
      const int row = is_source(p.plane) ? n_.width_ * stride(p.plane) : 0;
      CadyqQuantizer q = conv.quantizer[k];
      q.multiplier = (conv.own_range() ? thread_.multiplier.data() : q.multiplier) + offset;
      const int from = stride(p.plane), channels = whole ? conv.c_in : p.channels;
      for (int y = box.y0; y < box.y1; ++y)
        for_row(p.plane, y, box.x0, box.x1, [&](const int16_t* v, int x, int n) {
          n_.kernels_->quantize(v + p.first, from, to.at(y, x) + offset * conv.element, conv.c_in, n, channels, &q, conv.store, row);
        });
      offset += p.channels;
    }
  }

  // Both layers of a block by strips of rows, the second one behind the first: no more of the codes between them than a
  // window, which stays in the cache however large the region is.
  void roll(int k) {
    const Layer &first = block_.layers[0], &second = block_.layers[1];
    Store& dst = n_.stores_[step_.dst];
    int16_t* to = dst.memory[n_.is_second(step_, first_tile_)];
    n_.for_tiles(region_, [&](int t) { dst.next[t] = to; });
    choose(1);  // of one candidate
    enter_bits(second, 0);
    const Box read = around(2), between = around(1);
    first_codes_ = codes(first, 0);
    blank(first_codes_, first.conv->quantizer[k].flip, read);
    blank(codes(second, 1), second.conv->quantizer[0].flip, between);
    const int rows = roll_rows(box_.height(), box_.width());
    int quantized = read.y0, ready = between.y0, done = box_.y0;
    while (done < box_.y1) {
      if (ready < between.y1) {
        const int end = std::min(between.y1, ready + rows), until = std::min(read.y1, end + 1);
        quantize(first, first_codes_, k, {quantized, read.x0, until, read.x1});
        quantized = until;
        convolve(first, 0, k, {ready, between.x0, end, between.x1}, nullptr);
        ready = end;
      }
      // Rows by the kernels' fours, but for the last ones.
      const int end = ready == between.y1 ? box_.y1 : done + (ready - 1 - done) / 4 * 4;
      if (end > done) convolve(second, 1, 0, {done, box_.x0, end, box_.x1}, to);
      done = std::max(done, end);
    }
  }
  // The row without a picture, and the columns beyond it.
  void blank(const Codes& c, uint8_t zero, const Box& box) const {
    if (!at_border_) return;
    std::memset(c.data, zero, c.pitch);
    for (int i = 1; i <= c.window; ++i) clear_sides(c, c.data + i * c.pitch, zero, box);
  }

  // The results in a box.
  void convolve(const Layer& layer, int i, int k, const Box& box, int16_t* result) {
    const Conv& conv = *layer.conv;
    const Codes from = codes(layer, i);
    const int rows = conv.kind == Conv::kWinograd ? (box.height() + 3) / 4 * 4 : box.height();
    thread_.in.clear();
    for (int y = box.y0 - conv.pad; y < box.y0 + rows + conv.pad; ++y) {
      const bool beyond = from.window && (y < 0 || y >= n_.height_);
      thread_.in.push_back(beyond ? from.data + (box.x0 - conv.pad - from.x0) * from.pixel : from.at(y, box.x0 - conv.pad));
    }
    thread_.out.clear();
    const Conv* next = nullptr;
    if (layer.fused) {
      const Layer& after = block_.layers[i + 1];
      next = after.conv;
      const Codes to = codes(after, i + 1);
      if (at_border_ && !to.window) clear(to, after, next->quantizer[0].flip, box);
      for (int y = box.y0; y < box.y1; ++y) thread_.out.push_back(to.at(y, box.x0));
    } else if (result) {
      for (int y = box.y0; y < box.y1; ++y)
        thread_.out.push_back(
            reinterpret_cast<uint8_t*>(result + (static_cast<size_t>(y) * n_.width_ + box.x0) * conv.dst_channels));
    } else {
      Hidden& to = thread_.values[layer.data->dst];
      to = {reinterpret_cast<int16_t*>(thread_.hidden[layer.hidden].get()), conv.dst_channels, box};
      for (int y = box.y0; y < box.y1; ++y) thread_.out.push_back(reinterpret_cast<uint8_t*>(to.at(y, box.x0)));
    }
    skip(layer, i, box);
    CadyqEpilogue e = n_.epilogue(conv, k, next, layer.data->rectify);
    if (conv.own_range()) e.factor = thread_.factor.data();
    const CadyqTarget target{thread_.out.data(), thread_.residual.empty() ? nullptr : thread_.residual.data(), 1,
                             conv.dst_channels, is_snapped_ ? &snap_ : nullptr};
    n_.convolve(conv, k, thread_.in, box.height(), box.width(), e, target, thread_);
  }

  // Rows of what is added: the values themselves where they lie as the results do, else a copy on the target's grid.
  void skip(const Layer& layer, int i, const Box& box) {
    thread_.residual.clear();
    is_snapped_ = false;
    if (!layer.skip.is_used()) return;
    const int plane = layer.skip.data->parts[0].plane, channels = layer.conv->dst_channels;
    const bool in_place = (layer.out == 0 || !is_source(plane)) && stride(plane) == channels;
    auto rows_in_place = [&] {
      for (int y = box.y0; y < box.y1; ++y)
        thread_.residual.push_back(
            is_source(plane) ? n_.stores_[plane].tiles[first_tile_] + (static_cast<size_t>(y) * n_.width_ + box.x0) * channels
                             : thread_.values[plane].at(y, box.x0));
    };
    if (layer.skip.is_plain() && in_place) return rows_in_place();
    static const std::vector<float> ones(1024, 1.f);
    const bool own = layer.skip.shared && block_.layers[0].conv->own_range();
    if (own) {  // equation (15)
      const std::vector<float>& ratio = layer.skip.ratio[first_choice_];
      const double levels = std::max(layer.skip.high[first_choice_], 1);
      for (size_t c = 0; c < std::min(ratio.size(), thread_.first_ratio.size()); ++c)
        thread_.first_ratio[c] = static_cast<float>(static_cast<double>(ratio[c]) * first_clip_ / levels);
    }
    auto snap_of = [&](int offset) {
      if (layer.skip.is_plain()) return CadyqSnap{nullptr, ones.data(), 0, 0};
      CadyqSnap snap = layer.skip.snap(layer.skip.shared ? first_choice_ : 0, offset);
      if (own) {
        snap.multiplier = thread_.first_multiplier.data() + offset;
        snap.ratio = thread_.first_ratio.data() + offset;
      }
      return snap;
    };
    if (in_place && n_.kernels_->snaps_residual && channels % 32 == 0 && n_.is_whole(layer.skip.data->parts) &&
        layer.skip.data->parts[0].channels == channels && layer.conv->slopes != CADYQ_ANY) {
      snap_ = snap_of(0);
      is_snapped_ = true;
      return rows_in_place();
    }
    const size_t pitch = static_cast<size_t>(box.width()) * channels;
    int16_t* made = reinterpret_cast<int16_t*>(thread_.skip.get());
    const Conv& first = *block_.layers[0].conv;
    if (n_.kernels_->expand && layer.skip.shared && i == 1 && block_.layers.size() == 2 && !own &&
        first.kind == Conv::kWinograd && first.c_in == channels) {
      // The first layer's codes are still there while the second one runs, and half the size of the values.
      const Codes& kept = first_codes_;
      for (int y = box.y0; y < box.y1; ++y, made += pitch) {
        n_.kernels_->expand(kept.at(y, box.x0), first.quantizer[first_choice_].is_unsigned, made, box.width(), channels,
                            layer.skip.ratio[first_choice_].data());
        thread_.residual.push_back(made);
      }
      return;
    }
    for (int y = box.y0; y < box.y1; ++y, made += pitch) {
      int offset = 0;
      for (const PartData& p : layer.skip.data->parts) {
        const CadyqSnap snap = snap_of(offset);
        const int from = stride(p.plane);
        for_row(p.plane, y, box.x0, box.x1, [&](const int16_t* v, int x, int n) {
          n_.kernels_->snap(v + p.first, from, made + static_cast<size_t>(x - box.x0) * channels + offset, channels, n,
                            p.channels, &snap);
        });
        offset += p.channels;
      }
      thread_.residual.push_back(made);
    }
  }

  Network& n_;
  const StepData& step_;
  const BlockPlan& block_;
  const Network::Choices choices_;
  const Region region_;
  const int first_tile_;
  const Box box_;
  Network::Thread& thread_;
  const bool at_border_;
  int first_choice_ = 0;
  Codes first_codes_{};
  CadyqSnap snap_{};  // of the rows of the residual, if they are to be snapped
  bool is_snapped_ = false;
  double first_clip_ = 1;
};

void Network::run_block(Pool& pool, const Segment& segment, const int8_t* forced, const uint8_t* exited, uint8_t* bits,
                        int8_t* choice) {
  const StepData& step = steps_[segment.block];
  const BlockPlan& block = blocks_[segment.block];
  Store& dst = stores_[step.dst];
  auto table = [&](const Segment& of) {
    const size_t shift = of.first_site;
    return Choices{forced + shift, bits + shift, choice + shift, static_cast<size_t>(n_sites_)};
  };
  const Choices choices = table(segment);
  const Segment* next = segment.chooses_next ? &segment + 1 : nullptr;
  // What the first layer reads is there, so its choices decide which tiles are computed as one.
  const bool known = block.chooses_first;
  if (known && !segment.chosen)
    pool.run(rows_ * columns_, [&](int t, int thread) {
      if (!exited[t]) RegionRun(*this, step, block, choices, tile_region(t), threads_[thread]).choose(0);
    });
  if (dynamic_) find_regions(segment.block, exited, choices);
  pool.run(static_cast<int>(regions_.size()), [&](int i, int thread) {
    const Region& region = regions_[i];
    const bool gone = exited[region.row0 * columns_ + region.column0];
    for_tiles(region, [&](int t) {
      const int from = known && !gone;
      std::fill_n(choices.bits + choices.at(t, 0), block.sites, 0);
      std::fill_n(choices.choice + choices.at(t, from), block.sites - from, -1);
      dst.next[t] = nullptr;
    });
    if (!gone) {
      RegionRun run(*this, step, block, choices, region, threads_[thread]);
      if (!known) run.choose(0);
      run.run(0);
    }
    for_tiles(region, [&](int t) {
      if (!dst.next[t]) keep(step, t);
    });
    // While the results are in the cache.
    if (next && !gone)
      RegionRun(*this, steps_[next->block], blocks_[next->block], table(*next), region, threads_[thread])
          .choose(0, dst.next);
  });
  dst.tiles.swap(dst.next);
}

}  // namespace cadyq
