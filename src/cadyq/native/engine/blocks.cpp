// Blocks, tile by tile; section 5.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "network.h"

namespace cadyq {

// Equation (10a): the same operations in the same order as the reference, so that choices agree everywhere.
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

void Network::run_block(Pool& pool, const Segment& segment, const int8_t* forced, const uint8_t* exited, uint8_t* bits,
                        int8_t* choice) {
  const StepData& step = steps_[segment.block];
  Store& dst = stores_[step.dst];
  const size_t n = blocks_[segment.block].sites;
  pool.run(static_cast<int>(regions_.size()), [&](int i, int thread) {
    const Region& region = regions_[i];
    const int t = region.row0 * columns_ + region.column0;
    const Tile tile{t, region.row0 * tile_, region.column0 * tile_, std::min(height_, region.row1 * tile_),
                    std::min(width_, region.column1 * tile_)};
    const size_t at = static_cast<size_t>(t) * n_sites_ + segment.first_site;
    std::fill(bits + at, bits + at + n, 0);
    std::fill(choice + at, choice + at + n, -1);
    dst.next[t] = nullptr;
    if (!exited[t]) run_tile(segment, tile, threads_[thread], forced + at, bits + at, choice + at);
    if (!dst.next[t]) keep(step, tile);
    for (int r = region.row0; r < region.row1; ++r)
      for (int c = region.column0; c < region.column1; ++c) {
        const int other = r * columns_ + c;
        if (other == t) continue;
        const size_t to = static_cast<size_t>(other) * n_sites_ + segment.first_site;
        std::copy_n(bits + at, n, bits + to);
        std::copy_n(choice + at, n, choice + to);
        dst.next[other] = dst.next[t];
      }
  });
  dst.tiles.swap(dst.next);
}

// What becomes of a tile that a block does not compute: its input, or zeros where nothing is added to it.
void Network::keep(const StepData& step, const Tile& tile) {
  const Store& src = stores_[step.src];
  Store& dst = stores_[step.dst];
  if (step.residual && step.src == step.dst) {  // the values stay where they are
    dst.next[tile.index] = src.tiles[tile.index];
    return;
  }
  int16_t* to = dst.memory[dst.two && step.src == step.dst && dst.memory[0] == src.tiles[tile.index] ? 1 : 0];
  for (int y = tile.y0; y < tile.y1; ++y) {
    const size_t offset = (static_cast<size_t>(y) * width_ + tile.x0) * dst.channels;
    const size_t bytes = static_cast<size_t>(tile.x1 - tile.x0) * dst.channels * 2;
    if (step.residual)
      std::memcpy(to + offset, src.tiles[tile.index] + offset, bytes);
    else
      std::memset(to + offset, 0, bytes);
  }
  dst.next[tile.index] = to;
}

// One tile through the layers of a block. Everything is clipped to the picture; beyond it, codes are zero.
class TileRun {
 public:
  TileRun(const Network& network, int step, Network::Tile tile, Network::Thread& thread)
      : n_(network),
        step_(network.steps_[step]),
        block_(network.blocks_[step]),
        tile_(tile),
        thread_(thread),
        inner_(region(0)),
        at_border_(tile.y0 < block_.halo || tile.x0 < block_.halo || tile.y1 + block_.halo > n_.height_ ||
                   tile.x1 + block_.halo > n_.width_) {}

  // Returns whether the tile was computed; if so its values are in `to`.
  bool run(int16_t* to, const int8_t* forced, uint8_t* bits, int8_t* choice) {
    bool coded = false;  // the layer before has written the codes already
    for (size_t i = 0; i < block_.layers.size(); ++i) {
      const Layer& layer = block_.layers[i];
      const Conv& conv = *layer.conv;
      int k = 0;
      if (!coded && layer.column >= 0) k = chosen(layer, forced[layer.column]);
      if (layer.column >= 0) choice[layer.column] = static_cast<int8_t>(k);
      if (conv.site->bits[k] == 0) return false;
      if (layer.column >= 0) bits[layer.column] = static_cast<uint8_t>(conv.site->bits[k]);
      if (i == 0) first_choice_ = k;
      if (conv.own_range()) find_range(layer, k);
      if (conv.own_range() && i == 0) {
        first_clip_ = thread_.clip;
        thread_.first_multiplier.assign(thread_.multiplier.begin(), thread_.multiplier.end());
      }
      if (!coded) quantize(layer, static_cast<int>(i), k);
      const bool last = i + 1 == block_.layers.size();
      convolve(layer, static_cast<int>(i), k, last ? to : nullptr);
      coded = layer.fused;
    }
    return true;
  }

 private:
  Box region(int margin) const {
    return {std::max(0, tile_.y0 - margin), std::max(0, tile_.x0 - margin), std::min(n_.height_, tile_.y1 + margin),
            std::min(n_.width_, tile_.x1 + margin)};
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

  int chosen(const Layer& layer, int forced) {
    const SiteData& site = *layer.conv->site;
    if (forced >= 0) return forced;
    if (site.bits.size() == 1) return 0;
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
        values = n_.stores_[p.plane].tiles[tile_.index] + (tile_.y0 * width + tile_.x0) * channels;
      } else {
        width = thread_.values[p.plane].box.width();
        values = thread_.values[p.plane].at(tile_.y0, tile_.x0);
      }
      int64_t* to = whole ? sum : own;
      if (!whole) std::fill(own, own + 2 * room, 0);
      n_.kernels_->sums(values, width * channels * 2, inner_.height(), inner_.width(), channels, to, to + room);
      if (whole) break;
      std::copy_n(own + p.first, p.channels, sum + offset);
      std::copy_n(own + room + p.first, p.channels, sum + room + offset);
      offset += p.channels;
    }
    return n_.select(site, tile_.index, static_cast<int64_t>(inner_.height()) * inner_.width(), thread_);
  }

  void find_range(const Layer& layer, int k) {
    std::fill(thread_.largest.begin(), thread_.largest.end(), 0);
    int offset = 0;
    for (const PartData& p : layer.data->src) {
      const int channels = stride(p.plane);
      int32_t* most = thread_.largest.data() + offset;
      for (int y = inner_.y0; y < inner_.y1; ++y)
        for_row(p.plane, y, inner_.x0, inner_.x1, [&](const int16_t* v, int, int n) {
          for (const int16_t* end = v + static_cast<size_t>(n) * channels; v < end; v += channels)
            for (int c = 0; c < p.channels; ++c) most[c] = std::max(most[c], std::abs(static_cast<int32_t>(v[p.first + c])));
        });
      offset += p.channels;
    }
    n_.own_range(*layer.conv, k, thread_);
  }

  // The codes of layer i: rows of a buffer that begins `margin` pixels above and left of the tile.
  struct Codes {
    uint8_t* data;
    size_t pitch, pixel;
    int y0, x0;
    uint8_t* at(int y, int x) const { return data + (y - y0) * pitch + (x - x0) * pixel; }
  };
  Codes codes(const Layer& layer, int i) const {
    const int margin = layer.out + layer.conv->pad;
    const size_t pixel = layer.conv->pixel_bytes();
    return {thread_.codes[i & 1].get(), (static_cast<size_t>(tile_.x1 - tile_.x0) + 2 * margin + 8) * pixel, pixel,
            tile_.y0 - margin, tile_.x0 - margin};
  }
  // All but a box that lies within the codes and is written afterwards.
  void clear(const Codes& c, const Layer& layer, uint8_t zero, const Box& box) const {
    const int margin = layer.out + layer.conv->pad, rows = tile_.y1 - tile_.y0 + 2 * margin + 6;
    for (int i = 0; i < rows; ++i) {
      uint8_t *row = c.data + i * c.pitch, *end = row + c.pitch;
      const int y = c.y0 + i;
      if (y < box.y0 || y >= box.y1) {
        std::memset(row, zero, c.pitch);
        continue;
      }
      uint8_t *first = c.at(y, box.x0), *last = c.at(y, box.x1);
      std::memset(row, zero, first - row);
      std::memset(last, zero, end - last);
    }
  }

  void quantize(const Layer& layer, int i, int k) {
    const Conv& conv = *layer.conv;
    const Codes to = codes(layer, i);
    const bool whole = n_.is_whole(layer.data->src);
    const Box box = region(layer.out + conv.pad);
    if (at_border_ || !whole) clear(to, layer, conv.quantizer[k].flip, whole ? box : Box{});
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

  void convolve(const Layer& layer, int i, int k, int16_t* result) {
    const Conv& conv = *layer.conv;
    const Box box = region(layer.out);
    const Codes from = codes(layer, i);
    const int rows = conv.kind == Conv::kWinograd ? (box.height() + 3) / 4 * 4 : box.height();
    thread_.in.clear();
    for (int y = 0; y < rows + 2 * conv.pad; ++y) thread_.in.push_back(from.at(box.y0 - conv.pad + y, box.x0 - conv.pad));
    thread_.out.clear();
    const Conv* next = nullptr;
    if (layer.fused) {
      const Layer& after = block_.layers[i + 1];
      next = after.conv;
      const Codes to = codes(after, i + 1);
      if (at_border_) clear(to, after, next->quantizer[0].flip, box);
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
            is_source(plane) ? n_.stores_[plane].tiles[tile_.index] + (static_cast<size_t>(y) * n_.width_ + box.x0) * channels
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
    if (n_.kernels_->expand && layer.skip.shared && i == 1 && !own && first.kind == Conv::kWinograd && first.c_in == channels) {
      // The first layer's codes are still there while the second one runs, and half the size of the values.
      const Codes kept = codes(block_.layers[0], 0);
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

  const Network& n_;
  const StepData& step_;
  const BlockPlan& block_;
  const Network::Tile tile_;
  Network::Thread& thread_;
  const Box inner_;
  const bool at_border_;
  int first_choice_ = 0;
  CadyqSnap snap_{};  // of the rows of the residual, if they are to be snapped
  bool is_snapped_ = false;
  double first_clip_ = 1;
};

void Network::run_tile(const Segment& segment, Tile tile, Thread& thread, const int8_t* forced, uint8_t* bits,
                       int8_t* choice) {
  const StepData& step = steps_[segment.block];
  Store& dst = stores_[step.dst];
  // A second buffer is needed where the source is updated: neighbors read the old values.
  int16_t* to = dst.memory[dst.two && step.src == step.dst && dst.memory[0] == dst.tiles[tile.index] ? 1 : 0];
  if (TileRun(*this, segment.block, tile, thread).run(to, forced, bits, choice)) dst.next[tile.index] = to;
}

}  // namespace cadyq
