// Preparation of a plan: packed weights, padded tables, and groups of layers with their rolling windows.
#include "network.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace cadyq {
namespace {

constexpr int kAlign = 32;           // channels of hidden planes are padded to this
constexpr int kSlack = 12;           // pixels that kernels may read beyond a region
constexpr int kStripRows = 16;       // input rows per strip
constexpr int kRowsPerBand = 4;      // Winograd bands
constexpr int64_t kWinogradLimit = int64_t{1} << 25;  // equation (13)

int round_up(int a, int b) { return (a + b - 1) / b * b; }

}  // namespace

void Buffer::Free::operator()(uint8_t* p) const { std::free(p); }

uint8_t* Buffer::reserve(size_t bytes) {
  if (bytes > size_ || !data_) {
    const size_t rounded = (bytes + 4096 + 4095) / 4096 * 4096;
    data_.reset();
    size_ = 0;
    void* p = nullptr;
    if (posix_memalign(&p, 4096, rounded) != 0) throw std::bad_alloc();
    data_.reset(static_cast<uint8_t*>(p));
    std::memset(p, 0, rounded);
    size_ = rounded;
  }
  return data_.get();
}

void View::allocate() {
  pitch = (static_cast<size_t>(width + 2 * pad + kSlack) * channels * element + 63) / 64 * 64 + 64;
  const size_t rows = static_cast<size_t>(capacity) + 1;
  uint8_t* p = memory.reserve(rows * pitch);
  std::memset(p, zero, rows * pitch);
  empty = p + static_cast<size_t>(pad) * channels * element;
  base = empty + pitch;
}

Network::Network(const CadyqKernels* kernels, int scale, int tile) : kernels_(kernels), scale_(scale), plan_tile_(tile), tile_(tile) {}

int Network::padded(int plane) const { return round_up(planes_[plane].channels, kAlign); }

void Network::pack(const ConvData& data, Conv& conv) {
  const int k = data.kernel, real = data.c_out, per_pixel = real / (conv.shuffle * conv.shuffle);
  // Output o of the plan is output position(o) here, as target planes have padded channels.
  auto position = [&](int o) {
    return conv.kind == Conv::kColumns ? o : o / per_pixel * conv.dst_channels + o % per_pixel;
  };
  auto at = [&](int o, int i, int j, int c) -> int {
    return data.weight[((static_cast<size_t>(o) * k + i) * k + j) * data.c_in + c];
  };
  if (conv.kind == Conv::kWinograd) {
    static const int g[6][3] = {{6, 0, 0}, {-4, -4, -4}, {-4, 4, -4}, {1, 2, 4}, {1, -2, 4}, {0, 0, 6}};  // (12)
    const int block = kernels_->winograd_block, blocks = round_up(conv.c_out, block) / block;
    int16_t* out = reinterpret_cast<int16_t*>(
        conv.weights.reserve(static_cast<size_t>(blocks) * 36 * conv.c_in * block * sizeof(int16_t)));
    for (int o = 0; o < real; ++o) {
      const int to = position(o);
      for (int c = 0; c < data.c_in; ++c)
        for (int p = 0; p < 36; ++p) {
          int sum = 0;
          for (int i = 0; i < 3; ++i)
            for (int j = 0; j < 3; ++j) sum += g[p / 6][i] * g[p % 6][j] * at(o, i, j, c);
          out[((static_cast<size_t>(to / block * 36 + p) * (conv.c_in / 2) + c / 2) * block + to % block) * 2 + c % 2] =
              static_cast<int16_t>(sum);
        }
    }
    return;
  }
  // Runs of inputs in groups of four bytes, for each row of the kernel; columns take one pixel at a time.
  const bool columns = conv.kind == Conv::kColumns;
  const int group = 4 / conv.element, run = columns ? conv.c_in : k * conv.c_in, steps = (run + group - 1) / group;
  const int block = columns && kernels_->direct_block > 32 ? 32 : kernels_->direct_block;
  const int outputs = columns ? 32 : round_up(conv.c_out, block);
  const size_t count = static_cast<size_t>(outputs) * k * steps * group;
  uint8_t* bytes = conv.weights.reserve(count * conv.element);
  std::vector<int64_t> total(outputs, 0);
  for (int o = 0; o < real; ++o)
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < k; ++j)
        for (int c = 0; c < data.c_in; ++c) {
          const int to = columns ? j * real + o : position(o), in = columns ? c : j * conv.c_in + c, w = at(o, i, j, c);
          const size_t index =
              ((static_cast<size_t>(to / block * k + i) * steps + in / group) * block + to % block) * group + in % group;
          total[to] += w;
          if (conv.element == 1)
            reinterpret_cast<int8_t*>(bytes)[index] = static_cast<int8_t>(w);
          else
            reinterpret_cast<int16_t*>(bytes)[index] = static_cast<int16_t>(w);
        }
  for (const auto& q : conv.quantizer) {  // codes stored with an offset of 128 are corrected here
    std::vector<int32_t> init(outputs, 0);
    for (int o = 0; o < outputs; ++o) init[o] = q.flip ? static_cast<int32_t>(-128 * total[o]) : 0;
    conv.init.push_back(init);
  }
  if (conv.raw) conv.init.push_back(std::vector<int32_t>(outputs, 0));
}

Conv* Network::prepare(const ConvData& data, int shuffle, bool few_outputs, bool from_image) {
  convs_.push_back(std::make_unique<Conv>());
  Conv& conv = *convs_.back();
  conv.kernel = data.kernel;
  conv.pad = data.kernel / 2;
  conv.shuffle = shuffle;
  conv.raw = !data.has_site;
  conv.c_in = from_image ? data.c_in : round_up(data.c_in, kAlign);
  const int per_pixel = data.c_out / (shuffle * shuffle);
  conv.dst_channels = round_up(per_pixel, kAlign);
  conv.c_out = shuffle * shuffle * conv.dst_channels;
  int64_t largest = 1, norm = 0;
  if (data.has_site)
    for (size_t i = 0; i < data.site.bits.size(); ++i)
      largest = std::max<int64_t>({largest, std::abs(data.site.low[i]), std::abs(data.site.high[i])});
  const size_t per_output = data.weight.size() / data.c_out;
  for (int o = 0; o < data.c_out; ++o) {
    int64_t sum = 0;
    for (size_t i = 0; i < per_output; ++i) sum += std::abs(static_cast<int>(data.weight[o * per_output + i]));
    norm = std::max(norm, sum);
  }
  if (few_outputs && !conv.raw && shuffle == 1 && data.c_out <= 4 && data.c_out * data.kernel <= 29) {
    conv.kind = Conv::kColumns;
    conv.c_out = data.c_out;
  } else if (kernels_->has_winograd && !conv.raw && data.kernel == 3 && norm * largest < kWinogradLimit) {
    conv.kind = Conv::kWinograd;
  }
  conv.element = conv.kind == Conv::kWinograd ? 1 : conv.raw ? 2 : kernels_->code_bytes;
  conv.store = conv.raw ? CADYQ_INT16 : conv.element == 1 ? CADYQ_CODE8 : CADYQ_CODE16;
  const int candidates = data.has_site ? static_cast<int>(data.site.bits.size()) : 1;
  const int outputs = round_up(conv.c_out, 64);
  auto spread = [&](const float* from) {
    std::vector<float> to(outputs, 0.f);
    for (int o = 0; o < data.c_out; ++o)
      to[conv.kind == Conv::kColumns ? o : o / per_pixel * conv.dst_channels + o % per_pixel] = from[o];
    return to;
  };
  for (int i = 0; i < candidates; ++i) {
    conv.factor.push_back(spread(data.factor.data() + static_cast<size_t>(i) * data.c_out));
    if (!data.has_site) continue;
    std::vector<float> m(conv.c_in, 0.f);
    std::copy_n(data.site.multiplier.data() + static_cast<size_t>(i) * data.c_in, data.c_in, m.data());
    conv.multiplier.push_back(std::move(m));
    CadyqQuantizer q{};
    q.low = data.site.low[i];
    q.high = data.site.high[i];
    q.is_unsigned = q.low == 0;
    q.flip = conv.kind != Conv::kWinograd && conv.element == 1 && !q.is_unsigned ? 0x80 : 0;
    conv.quantizer.push_back(q);
  }
  for (size_t i = 0; i < conv.quantizer.size(); ++i) conv.quantizer[i].multiplier = conv.multiplier[i].data();
  conv.bias = spread(data.bias.data());
  if (!data.slope.empty()) conv.slope = spread(data.slope.data());
  conv.site = data.has_site ? &data.site : nullptr;
  pack(data, conv);
  return &conv;
}

// Lets `from` write the codes of `to`: its quantisers per output channel of `from`, sub-pixels included.
void Network::link(Conv& from, const Conv& to) {
  from.requant.clear();
  for (const auto& m : to.multiplier) {
    std::vector<float> r(round_up(from.c_out, 64), 0.f);
    for (int o = 0; o < from.c_out; ++o) r[o] = m[o % from.dst_channels];
    from.requant.push_back(std::move(r));
  }
}

bool Network::crosses(int plane) const { return stores_[plane].used; }

void Network::finish() {
  block_convs_.assign(steps_.size(), {});
  stores_ = std::vector<Store>(planes_.size());
  // Segments: each block alone, and the layers between blocks as one group.
  std::vector<int> segment_of(steps_.size()), pending;
  std::vector<std::vector<int>> members;
  int segment = 0;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const bool block = steps_[i].kind == StepData::kBlock;
    if (i > 0 && (block || steps_[i - 1].kind == StepData::kBlock)) ++segment;
    segment_of[i] = segment;
    members.resize(segment + 1);
    members[segment].push_back(static_cast<int>(i));
  }
  // Planes that live longer than a group, or that blocks touch, are kept whole.
  std::vector<int> written_in(planes_.size(), -1), block_writes(planes_.size(), 0);
  for (size_t i = 0; i < steps_.size(); ++i) {
    const StepData& s = steps_[i];
    for (int p : {s.src, s.residual})
      if (p >= 0 && (written_in[p] != segment_of[i] || s.kind == StepData::kBlock)) stores_[p].used = true;
    if (s.dst >= 0) {
      if (written_in[s.dst] >= 0 && s.kind != StepData::kBlock)
        throw std::invalid_argument("a layer writes a plane that was written before");
      written_in[s.dst] = segment_of[i];
      if (s.kind == StepData::kBlock) {
        stores_[s.dst].used = true;
        if (++block_writes[s.dst] > 1 || s.src == s.dst) stores_[s.dst].two = true;
      }
    }
  }
  for (size_t p = 0; p < planes_.size(); ++p)
    if (stores_[p].used && planes_[p].level != 1)
      throw std::invalid_argument("a plane above input resolution is used across blocks");
  for (int i = 0; i <= segment; ++i) {
    segments_.emplace_back();
    Segment& s = segments_.back();
    const int first = members[i][0];
    if (steps_[first].kind != StepData::kBlock) {
      plan_group(s.group, members[i], i);
      continue;
    }
    s.block = first;
    s.first_site = n_sites_;
    s.profile = static_cast<int>(profile_.size());
    profile_.emplace_back("block", 0.0);
    auto& convs = block_convs_[first];
    for (const auto& data : steps_[first].convs) convs.push_back(prepare(data, 1, false, false));
    for (size_t c = 0; c + 1 < convs.size(); ++c) link(*convs[c], *convs[c + 1]);
    n_sites_ += static_cast<int>(convs.size());
    for (const Conv* c : convs) {
      site_bits_.push_back(c->site->bits[0]);
      if (c->site->bits.size() > 1 || c->site->bits[0] == 0) dynamic_ = true;
    }
  }
}

void Network::plan_group(Group& group, const std::vector<int>& steps, int) {
  std::vector<int> view_of(planes_.size(), -1), codes_of(planes_.size(), -1), readers(planes_.size(), 0);
  std::vector<Conv*> conv_of(steps_.size(), nullptr);
  std::vector<int> reader(planes_.size(), -1);
  for (int i : steps) {
    const StepData& s = steps_[i];
    if (s.src >= 0) {
      ++readers[s.src];
      reader[s.src] = i;
    }
    if (s.residual >= 0) readers[s.residual] += 2;  // a residual needs the int16 values
  }
  auto add_view = [&](int channels, int element, int pad, uint8_t zero, int plane) {
    group.views.push_back(std::make_unique<View>());
    View& v = *group.views.back();
    v.channels = channels;
    v.element = element;
    v.pad = pad;
    v.zero = zero;
    v.width = v.height = planes_[plane].level;  // multiplied by the image's size later
    return static_cast<int>(group.views.size()) - 1;
  };
  for (int i : steps) {
    const StepData& s = steps_[i];
    if (s.kind != StepData::kLayer) continue;
    const bool last = reader[s.dst] >= 0 && steps_[reader[s.dst]].kind == StepData::kImageOut && readers[s.dst] == 1 &&
                      s.residual < 0 && !crosses(s.dst);
    conv_of[i] = prepare(s.convs[0], s.shuffle, last, s.src == steps_[0].dst);
  }
  for (int i : steps) {
    const StepData& s = steps_[i];
    Node node;
    node.step = &s;
    if (s.kind == StepData::kImageOut) continue;  // the layer before it writes the image
    if (s.kind == StepData::kImageIn) {
      const int r = reader[s.dst];
      if (crosses(s.dst) || readers[s.dst] != 1 || !conv_of[r] || !conv_of[r]->raw)
        throw std::invalid_argument("the image plane must be read by exactly one convolution, without a site");
      node.kind = Node::kImageIn;
      node.dst_view = codes_of[s.dst] = add_view(planes_[s.dst].channels, 2, conv_of[r]->pad, 0, s.dst);
      node.profile = static_cast<int>(profile_.size());
      profile_.emplace_back("image in", 0.0);
      group.nodes.push_back(node);
      continue;
    }
    Conv* conv = conv_of[i];
    if (codes_of[s.src] < 0) {
      Node q;
      q.kind = Node::kQuantize;
      q.step = &s;
      q.conv = conv;
      q.src_plane = crosses(s.src) ? s.src : -1;
      q.src_view = view_of[s.src];
      q.dst_view = add_view(conv->c_in, conv->element, conv->pad, conv->raw ? 0 : conv->quantizer[0].flip, s.src);
      q.profile = static_cast<int>(profile_.size());
      profile_.emplace_back("quantize", 0.0);
      group.nodes.push_back(q);
      node.src_view = q.dst_view;
    } else {
      node.src_view = codes_of[s.src];
    }
    node.conv = conv;
    node.profile = static_cast<int>(profile_.size());
    profile_.emplace_back("layer " + std::to_string(conv->kernel) + "x" + std::to_string(conv->kernel) + " " +
                              std::to_string(s.convs[0].c_in) + "->" + std::to_string(s.convs[0].c_out),
                          0.0);
    if (s.residual >= 0) {
      node.residual_plane = crosses(s.residual) ? s.residual : -1;
      node.residual_view = view_of[s.residual];
    }
    const int r = reader[s.dst];
    if (r >= 0 && steps_[r].kind == StepData::kImageOut) {
      if (readers[s.dst] != 1 || s.residual >= 0)
        throw std::invalid_argument("the output plane must be written by one layer, without a residual");
      node.kind = Node::kImageOut;
      group.nodes.push_back(node);
      continue;
    }
    Conv* next = r >= 0 && !crosses(s.dst) && readers[s.dst] == 1 && s.residual < 0 ? conv_of[r] : nullptr;
    if (next && !next->raw) {  // int16 values that are read as they are take a padded copy instead
      link(*conv, *next);
      node.next = next;
      node.dst_view = codes_of[s.dst] = add_view(next->c_in, next->element, next->pad, next->quantizer[0].flip, s.dst);
    } else if (crosses(s.dst)) {
      node.dst_plane = s.dst;
    } else {
      node.dst_view = view_of[s.dst] = add_view(conv->dst_channels, 2, 0, 0, s.dst);
    }
    group.nodes.push_back(node);
  }
}

// Rows each stage must have done after each strip, and the window of rows its result must keep.
void Network::schedule(Group& group) {
  auto& nodes = group.nodes;
  const int n = static_cast<int>(nodes.size());
  group.strips = (height_ + kStripRows - 1) / kStripRows;
  std::vector<int> level(n, 1);
  for (int i = 0; i < n; ++i) {
    Node& node = nodes[i];
    if (node.src_view >= 0) level[i] = group.views[node.src_view]->height / height_;
    node.height = height_ * level[i];
    node.until.assign(group.strips, 0);
  }
  group.skips = nodes.back().kind == Node::kImageOut;
  group.margin = 0;
  for (int i = 0; i < n; ++i) {
    if (nodes[i].dst_plane >= 0 || nodes[i].kind == Node::kImageIn) group.skips = false;
    if (nodes[i].conv && nodes[i].kind != Node::kQuantize) group.margin += (nodes[i].conv->pad + level[i] - 1) / level[i];
  }
  auto produces = [&](int i) { return nodes[i].kind == Node::kConv ? nodes[i].conv->shuffle : 1; };
  for (int strip = 0; strip < group.strips; ++strip) {
    std::vector<int> need(group.views.size(), 0);
    for (int i = n - 1; i >= 0; --i) {
      Node& node = nodes[i];
      int rows = std::min(node.height, (strip + 1) * kStripRows * level[i]);
      if (node.dst_view >= 0) rows = std::min(node.height, (need[node.dst_view] + produces(i) - 1) / produces(i));
      if (node.conv && node.kind == Node::kConv && node.conv->kind == Conv::kWinograd)
        rows = std::min(node.height, round_up(rows, kRowsPerBand));
      if (strip + 1 == group.strips) rows = node.height;
      node.until[strip] = rows;
      const int pad = node.kind == Node::kConv || node.kind == Node::kImageOut ? node.conv->pad : 0;
      if (node.src_view >= 0) {
        View& v = *group.views[node.src_view];
        need[node.src_view] = std::max(need[node.src_view], std::min(v.height, rows + pad));
      }
      if (node.residual_view >= 0)
        need[node.residual_view] = std::max(need[node.residual_view], rows * node.conv->shuffle);
    }
  }
  for (size_t v = 0; v < group.views.size(); ++v) {
    int capacity = 1;
    for (int strip = 0; strip < group.strips; ++strip) {
      int oldest = group.views[v]->height, newest = 0;
      for (int i = 0; i < n; ++i) {
        const Node& node = nodes[i];
        const int from = strip ? node.until[strip - 1] : 0;
        if (node.dst_view == static_cast<int>(v)) newest = node.until[strip] * produces(i);
        const int pad = node.kind == Node::kConv || node.kind == Node::kImageOut ? node.conv->pad : 0;
        if (node.src_view == static_cast<int>(v)) oldest = std::min(oldest, from - pad);
        if (node.residual_view == static_cast<int>(v)) oldest = std::min(oldest, from * node.conv->shuffle);
      }
      capacity = std::max(capacity, newest - std::max(oldest, 0));
    }
    group.views[v]->capacity = std::min(group.views[v]->height, capacity);
  }
}

void Network::resize(const Image& in, int threads, int tile) {
  const bool same = tile == tile_ && in.height == height_ && in.width == width_ && in.wide == wide_;
  if (same && static_cast<int>(threads_.size()) >= threads) return;
  const int old_height = height_ ? height_ : 1, old_width = width_ ? width_ : 1;
  tile_ = tile;
  height_ = in.height;
  width_ = in.width;
  wide_ = in.wide;
  rows_ = (height_ + tile_ - 1) / tile_;
  columns_ = (width_ + tile_ - 1) / tile_;
  for (Segment& s : segments_) {
    if (s.block >= 0) continue;
    for (auto& v : s.group.views) {
      v->height = v->height / old_height * height_;
      v->width = v->width / old_width * width_;
    }
    schedule(s.group);
    for (auto& v : s.group.views) v->allocate();
  }
  for (size_t p = 0; p < planes_.size(); ++p) {
    Store& s = stores_[p];
    if (!s.used) continue;
    s.height = height_;
    s.width = width_;
    s.channels = padded(static_cast<int>(p));
    const size_t bytes = static_cast<size_t>(height_) * width_ * s.channels * 2;
    s.memory[0].reserve(bytes);
    if (s.two) s.memory[1].reserve(bytes);
    s.tiles.assign(static_cast<size_t>(rows_) * columns_, reinterpret_cast<int16_t*>(s.memory[0].get()));
    s.next = s.tiles;
  }
  gradients_.assign(static_cast<size_t>(rows_) * columns_ * 2, 0.0);
  threads_.resize(std::max<size_t>(threads_.size(), threads));
  int c_max = 32, halo = 0;
  for (const auto& convs : block_convs_) {
    int sum = 0;
    for (const Conv* c : convs) sum += c->pad;
    halo = std::max(halo, sum);
  }
  for (const auto& c : convs_) c_max = std::max({c_max, c->c_in, c->dst_channels});
  const size_t side = static_cast<size_t>(tile_) + 2 * halo + kSlack, region = side * side * c_max * 2;
  int level = 1;
  for (const auto& p : planes_) level = std::max(level, p.level);
  for (Thread& t : threads_) {
    t.kernel.reserve(kernels_->scratch_bytes(c_max));
    if (halo) {
      t.codes[0].reserve(region);
      t.codes[1].reserve(region);
      t.hidden.reserve(region);
    }
    t.rows_out.reserve(static_cast<size_t>(width_ * level + kSlack) * 1024);
    const size_t most = std::max<size_t>(side, 4096) + 64;
    t.in.reserve(most);
    t.out.reserve(most);
    t.residual.reserve(most);
    t.sums.assign(static_cast<size_t>(2) * c_max, 0);
    t.inputs.assign(static_cast<size_t>(2) + c_max, 0);
  }
}

std::vector<std::pair<std::string, double>> Network::profile() const { return profile_; }

}  // namespace cadyq
