// Preparation of a plan: packed weights, padded tables, and groups of layers with their rolling windows.
#include "network.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace cadyq {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr int kAlign = 32;           // channels of hidden planes are padded to this, or to the kernels' own block
constexpr int kSlack = 12;           // pixels that kernels may read beyond a region
constexpr int kStripRows = 16;       // input rows per strip, or
constexpr int kStripPixels = 8192;   // fewer where they are long: at the output's size a row weighs 16 times as much
constexpr int kLargestRegion = 96;   // pixels a side of tiles that are computed as one, or
constexpr int kRolledHeight = 192, kRolledWidth = 256;  // where blocks keep but a window of rows
constexpr int kRowsPerBand = 4;      // Winograd bands
constexpr int64_t kWinogradLimit = int64_t{1} << 25;  // equation (13)
constexpr int64_t kColumns4Limit = int64_t{1} << 28;  // equation (13a)
constexpr int kWinogradG[6][3] = {{6, 0, 0}, {-4, -4, -4}, {-4, 4, -4}, {1, 2, 4}, {1, -2, 4}, {0, 0, 6}};  // (12)

int round_up(int a, int b) { return (a + b - 1) / b * b; }

}  // namespace

void Buffer::Free::operator()(uint8_t* p) const { std::free(p); }

uint8_t* Buffer::reserve(size_t bytes) {
  if (bytes > size_ || !data_) {
    // Planes are walked through by rows of tiles: with pages of 4 KiB, looking up their addresses would take longer
    // than the work on them.
    const bool large = bytes >= kHugePage;
    const size_t page = large ? kHugePage : 4096, rounded = (bytes + 4096 + page - 1) / page * page;
    data_.reset();
    size_ = 0;
    void* p = nullptr;
    if (posix_memalign(&p, page, rounded) != 0) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (large) madvise(p, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // what is left of the last one stays untouched
#endif
    data_.reset(static_cast<uint8_t*>(p));
    std::memset(p, 0, bytes + 4096);
    size_ = bytes;
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

int Network::round_channels(int channels) const {
  return round_up(channels, channels > kAlign ? kernels_->channel_block : kAlign);
}

void Network::pack(const ConvData& data, Conv& conv, int64_t largest_sum, bool pixels) {
  const int k = data.kernel, real = data.c_out, per_pixel = real / (conv.shuffle * conv.shuffle);
  // Output o of the plan is output position(o) here, as target planes have padded channels.
  auto position = [&](int o) {
    return conv.kind == Conv::kColumns ? o : o / per_pixel * conv.dst_channels + o % per_pixel;
  };
  const int in_group = data.c_in / data.groups, out_group = real / data.groups;
  auto at = [&](int o, int i, int j, int c) -> int {  // groups become zero weights
    const int inner = c - o / out_group * in_group;
    if (inner < 0 || inner >= in_group) return 0;
    return data.weight[((static_cast<size_t>(o) * k + i) * k + j) * in_group + inner];
  };
  // Equation (12), or (13b) where a kernel of 5x5 is four parts of 3x3.
  auto pack_winograd = [&](Buffer& to, int parts) {
    const int block = kernels_->winograd_block, blocks = round_up(conv.c_out, block) / block, depth = parts * conv.c_in;
    int16_t* out =
        reinterpret_cast<int16_t*>(to.reserve(static_cast<size_t>(blocks) * 36 * depth * block * sizeof(int16_t)));
    for (int o = 0; o < real; ++o)
      for (int c = 0; c < data.c_in; ++c)
        for (int part = 0; part < parts; ++part)
          for (int p = 0; p < 36; ++p) {
            const int y = part / 2 * 3, x = part % 2 * 3, at_o = position(o), in = part * conv.c_in + c;
            int sum = 0;
            for (int i = 0; i < 3 && y + i < k; ++i)
              for (int j = 0; j < 3 && x + j < k; ++j) sum += kWinogradG[p / 6][i] * kWinogradG[p % 6][j] * at(o, y + i, x + j, c);
            out[((static_cast<size_t>(at_o / block * 36 + p) * (depth / 2) + in / 2) * block + at_o % block) * 2 + in % 2] =
                static_cast<int16_t>(sum);
          }
  };
  if (conv.kind == Conv::kWinograd) return pack_winograd(conv.weights, 1);
  // Runs of inputs in groups of four bytes, for each row of the kernel; columns take one pixel at a time.
  const bool columns = conv.kind == Conv::kColumns;
  const int group = 4 / conv.weight_bytes, run = columns ? conv.c_in : k * conv.c_in;
  const int steps = round_up(run, conv.weight_bytes == 1 ? kernels_->run_block : group) / group;
  const int packed = conv.weight_bytes == 1 && kernels_->code_block ? kernels_->code_block : kernels_->direct_block;
  const int block = columns ? std::min(packed, 32) : packed;
  const int outputs = columns ? 32 : round_up(conv.c_out, block);
  const size_t count = static_cast<size_t>(outputs) * k * steps * group;
  uint8_t* bytes = conv.weights.reserve(count * conv.weight_bytes);
  std::vector<int64_t> total(outputs, 0);
  for (int o = 0; o < real; ++o)
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < k; ++j)
        for (int c = 0; c < data.c_in; ++c) {
          const int to = columns ? j * real + o : position(o), in = columns ? c : j * conv.c_in + c, w = at(o, i, j, c);
          const size_t index =
              ((static_cast<size_t>(to / block * k + i) * steps + in / group) * block + to % block) * group + in % group;
          total[to] += w;
          if (conv.weight_bytes == 1)
            reinterpret_cast<int8_t*>(bytes)[index] = static_cast<int8_t>(w);
          else
            reinterpret_cast<int16_t*>(bytes)[index] = static_cast<int16_t>(w);
        }
  if (columns && kernels_->columns4 && k % 3 == 0 && conv.element == 2 && largest_sum < kColumns4Limit) {
    // [half of the outputs][6][k / 3 parts and inputs in pairs][16 outputs][2]
    const int depth = k / 3 * conv.c_in, halves = (k * real + 15) / 16;
    int16_t* out = reinterpret_cast<int16_t*>(conv.weights4.reserve(static_cast<size_t>(halves) * 6 * depth * 16 * 2));
    for (int o = 0; o < real; ++o)
      for (int j = 0; j < k; ++j)
        for (int a = 0; a < 6; ++a)
          for (int part = 0; part < k / 3; ++part)
            for (int c = 0; c < data.c_in; ++c) {
              const int to = j * real + o, in = part * conv.c_in + c;
              int sum = 0;
              for (int i = 0; i < 3; ++i) sum += kWinogradG[a][i] * at(o, 3 * part + i, j, c);
              out[((static_cast<size_t>(to / 16 * 6 + a) * (depth / 2) + in / 2) * 16 + to % 16) * 2 + in % 2] =
                  static_cast<int16_t>(sum);
            }
  }
  if (pixels && !columns && kernels_->winograd5 && k == 5 && conv.element == 2 && !conv.raw && largest_sum < kWinogradLimit)
    pack_winograd(conv.weights4, 4);
  // Offsets of 128 are corrected here: added to signed codes, subtracted from unsigned ones and low bytes of values.
  auto add_init = [&](int correction) {
    conv.init.emplace_back(outputs, 0);
    for (int o = 0; o < outputs; ++o) conv.init.back()[o] = static_cast<int32_t>(correction * total[o]);
  };
  for (const auto& q : conv.quantizer) add_init(!q.flip ? 0 : q.is_unsigned ? 128 : -128);
  if (conv.raw) add_init(conv.weight_bytes == 1 && kernels_->code_offset == CADYQ_OFFSET_UNSIGNED ? 128 : 0);
}

// What is not `inside` belongs to pixels of the border: few enough to be computed one by one.
Conv* Network::prepare(const ConvData& data, int shuffle, bool is_last, bool from_image, bool inside) {
  convs_.push_back(std::make_unique<Conv>());
  Conv& conv = *convs_.back();
  conv.kernel = data.kernel;
  conv.pad = data.kernel / 2;
  conv.raw = !data.has_site;
  conv.c_in = from_image ? data.c_in : round_channels(data.c_in);
  // The last layer's results are shuffled when they become pixels, and need no padding for each of them.
  conv.shuffle = is_last ? 1 : shuffle;
  const int per_pixel = data.c_out / (conv.shuffle * conv.shuffle);
  conv.dst_channels = is_last ? round_up(per_pixel, 16) : round_channels(per_pixel);
  conv.c_out = conv.shuffle * conv.shuffle * conv.dst_channels;
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
  if (is_last && !conv.raw && data.c_out <= 4 && data.c_out * data.kernel <= 29) {
    conv.kind = Conv::kColumns;
    conv.c_out = data.c_out;
  } else if (kernels_->has_winograd && !conv.raw && !is_last && data.kernel == 3 && norm * largest < kWinogradLimit) {
    conv.kind = Conv::kWinograd;
  }
  conv.element = conv.kind == Conv::kWinograd ? 1 : conv.raw ? 2 : kernels_->code_bytes;
  const bool is_split = kernels_->splits_values == CADYQ_SPLIT_ALL ||
                        (kernels_->splits_values && !from_image && data.kernel <= CADYQ_MAX_SPLIT_KERNEL);
  conv.weight_bytes = conv.raw && is_split ? 1 : conv.element;
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
    const bool is_offset = kernels_->code_offset == (q.is_unsigned ? CADYQ_OFFSET_UNSIGNED : CADYQ_OFFSET_SIGNED);
    q.flip = conv.kind != Conv::kWinograd && conv.element == 1 && is_offset ? 0x80 : 0;
    conv.quantizer.push_back(q);
  }
  for (size_t i = 0; i < conv.quantizer.size(); ++i) conv.quantizer[i].multiplier = conv.multiplier[i].data();
  conv.bias = spread(data.bias.data());
  if (!data.slope.empty()) conv.slope = spread(data.slope.data());
  const auto [least, most] = std::minmax_element(conv.slope.begin(), conv.slope.end());
  if (!conv.slope.empty()) conv.slopes = *least < 0 || *most > 1 ? CADYQ_ANY : *most == 0 ? CADYQ_ZEROS : CADYQ_FRACTIONS;
  const double most_in = conv.raw ? 32768 : static_cast<double>(largest);
  for (const auto& factor : conv.factor)
    for (int o = 0; o < outputs; ++o)
      conv.largest =
          std::max(conv.largest, std::abs(static_cast<double>(norm) * most_in * factor[o]) + std::abs(conv.bias[o]));
  if (data.levels) {
    conv.levels = data.levels;
    conv.gain = spread(data.gain.data());
  }
  conv.site = data.has_site ? &data.site : nullptr;
  pack(data, conv, norm * largest, is_last && inside);
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
  // Codes clamp more than int16 does, and what is rounded to them fits into 32 bits.
  const CadyqQuantizer& q = to.quantizer[0];
  from.covers = !from.own_range();
  for (int o = 0; o < from.c_out; ++o) {
    const float m = from.requant[0][o];
    const bool padded = m == 0;
    from.covers &= padded || (32767.f * m >= static_cast<float>(q.high) && -32768.f * m <= static_cast<float>(q.low) &&
                              from.largest * m < 1e9);
  }
  from.covers &= from.largest < 1e9;
}

Skip Network::prepare_skip(const LayerData& data, const SiteData* first, int channels) const {
  Skip skip;
  if (!data.has_skip) return skip;
  skip.data = &data.skip;
  skip.shared = data.skip.shared;
  int real = 0;
  for (const PartData& p : data.skip.parts) real += p.channels;
  auto rows = [&](const std::vector<float>& from) {
    std::vector<std::vector<float>> to;
    for (size_t k = 0; k * real < from.size(); ++k) {
      to.emplace_back(round_up(channels, 64), 0.f);
      std::copy_n(from.data() + k * real, real, to.back().data());
    }
    return to;
  };
  skip.ratio = rows(data.skip.ratio);
  const SiteData* site = skip.shared ? first : data.skip.has_site ? &data.skip.site : nullptr;
  if (site) {
    skip.multiplier = rows(site->multiplier);
    skip.low = site->low;
    skip.high = site->high;
  } else if (skip.ratio.empty() && !is_whole(data.skip.parts)) {
    skip.ratio.emplace_back(round_up(channels, 64), 1.f);
  }
  return skip;
}

CadyqSnap Skip::snap(int k, size_t offset) const {
  CadyqSnap s{};
  s.ratio = ratio[k].data() + offset;
  if (!multiplier.empty()) {
    s.multiplier = multiplier[k].data() + offset;
    s.low = low[k];
    s.high = high[k];
  }
  return s;
}

bool Network::is_whole(const std::vector<PartData>& parts) const {
  return parts.size() == 1 && parts[0].first == 0 && parts[0].channels == planes_[parts[0].plane].channels;
}

void Network::finish() {
  blocks_.resize(steps_.size());
  stores_ = std::vector<Store>(planes_.size());
  // Segments: each block alone, and the layers between blocks as one group.
  std::vector<int> segment_of(steps_.size());
  std::vector<std::vector<int>> members;
  int segment = 0;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const bool block = steps_[i].kind == StepData::kBlock;
    if (i > 0 && (block || steps_[i - 1].kind == StepData::kBlock)) ++segment;
    segment_of[i] = segment;
    members.resize(segment + 1);
    members[segment].push_back(static_cast<int>(i));
  }
  find_stores(segment_of, segment + 1);
  share_buffers(segment_of, segment + 1);
  for (int i = 0; i <= segment; ++i) {
    segments_.emplace_back();
    Segment& s = segments_.back();
    const int first = members[i][0];
    if (steps_[first].kind != StepData::kBlock) {
      plan_group(s.group, members[i]);
      continue;
    }
    s.block = first;
    s.first_site = n_sites_;
    s.profile = static_cast<int>(profile_.size());
    profile_.emplace_back("block", 0.0);
    plan_block(first);
    n_sites_ += blocks_[first].sites;
  }
  // Packed weights are all that runs need.
  for (StepData& step : steps_)
    for (LayerData& layer : step.layers) {
      layer.conv.weight = {};
      for (ConvData& border : layer.borders) border.weight = {};
    }
  for (size_t i = 0; i + 1 < segments_.size(); ++i) {
    Segment &segment = segments_[i], &next = segments_[i + 1];
    if (segment.block < 0 || next.block < 0) continue;
    next.chosen = segment.chooses_next =
        blocks_[next.block].chooses_first && steps_[next.block].src == steps_[segment.block].dst;
  }
  find_margins();
  rolls_ = std::all_of(segments_.begin(), segments_.end(), [&](const Segment& s) { return s.block < 0 || blocks_[s.block].rolls; });
}

// Of regions, in tiles of the given size.
Sides Network::largest_sides(int tile) const {
  const int height = rolls_ ? kRolledHeight : kLargestRegion, width = rolls_ ? kRolledWidth : kLargestRegion;
  return {std::max(1, height / tile), std::max(1, width / tile)};
}

// How far beyond computed tiles each stage's result is read, from the picture backwards.
void Network::find_margins() {
  std::vector<int> plane(planes_.size(), 0);
  for (size_t i = segments_.size(); i-- > 0;) {
    if (segments_[i].block >= 0) {
      const StepData& step = steps_[segments_[i].block];
      // A tile that is not computed keeps its input, whose surroundings are then read in place of the result's.
      plane[step.src] = std::max({plane[step.src], blocks_[segments_[i].block].halo, step.residual ? plane[step.dst] : 0});
      continue;
    }
    Group& group = segments_[i].group;
    std::vector<int> view(group.views.size(), 0);
    for (size_t k = group.nodes.size(); k-- > 0;) {
      Node& node = group.nodes[k];
      const int shuffle = node.kind == Node::kConv ? node.conv->shuffle : 1;
      const int result = node.dst_plane >= 0 ? plane[node.dst_plane] : node.dst_view >= 0 ? view[node.dst_view] : 0;
      node.margin = (result + shuffle - 1) / shuffle;
      const bool convolves = node.kind == Node::kConv || node.kind == Node::kImageOut;
      auto read = [&](int from_plane, int from_view, int margin) {
        if (from_plane >= 0) plane[from_plane] = std::max(plane[from_plane], margin);
        if (from_view >= 0) view[from_view] = std::max(view[from_view], margin);
      };
      if (convolves) read(-1, node.src_view, node.margin + node.conv->pad);
      if (node.kind == Node::kQuantize) read(node.source.plane, node.source.view, node.margin);
      for (const Source& p : node.skip) read(p.plane, p.view, node.margin * shuffle);
    }
  }
}

// Planes that live longer than a group, or that blocks read and write, are kept whole.
void Network::find_stores(const std::vector<int>& segment_of, int) {
  std::vector<int> written_in(planes_.size(), -1);
  auto read = [&](int plane, size_t step) {
    if (written_in[plane] != segment_of[step]) stores_[plane].used = true;
  };
  for (size_t i = 0; i < steps_.size(); ++i) {
    const StepData& s = steps_[i];
    if (s.kind == StepData::kBlock) {
      stores_[s.src].used = stores_[s.dst].used = true;
      if (s.src == s.dst) stores_[s.dst].two = true;
      written_in[s.dst] = segment_of[i];
      continue;
    }
    if (s.kind == StepData::kImageOut) read(s.src, i);
    if (s.kind == StepData::kImageIn) written_in[s.dst] = segment_of[i];
    for (const LayerData& layer : s.layers) {
      for (const PartData& p : layer.src) read(p.plane, i);
      for (const PartData& p : layer.skip.parts) read(p.plane, i);
      written_in[layer.dst] = segment_of[i];
    }
  }
  for (size_t p = 0; p < planes_.size(); ++p)
    if (stores_[p].used && planes_[p].level != 1)
      throw std::invalid_argument("a plane above input resolution is used across blocks");
}

// Gives stores their buffers; one that is read for the last time in a segment frees its own for the segments behind.
void Network::share_buffers(const std::vector<int>& segment_of, int segments) {
  std::vector<int> first(planes_.size(), segments), last(planes_.size(), -1);
  auto touch = [&](int plane, size_t step) {
    if (plane < 0) return;
    first[plane] = std::min(first[plane], segment_of[step]);
    last[plane] = std::max(last[plane], segment_of[step]);
  };
  for (size_t i = 0; i < steps_.size(); ++i) {
    touch(steps_[i].src, i);
    touch(steps_[i].dst, i);
    if (steps_[i].kind == StepData::kBlock) continue;
    for (const LayerData& layer : steps_[i].layers) {
      touch(layer.dst, i);
      for (const PartData& p : layer.src) touch(p.plane, i);
      for (const PartData& p : layer.skip.parts) touch(p.plane, i);
    }
  }
  std::vector<int> free;
  int slots = 0;
  auto take = [&] {
    if (free.empty()) return slots++;
    const int slot = free.back();
    free.pop_back();
    return slot;
  };
  for (int s = 0; s < segments; ++s) {
    for (size_t p = 0; p < planes_.size(); ++p)
      if (stores_[p].used && first[p] == s) {
        stores_[p].slot[0] = take();
        if (stores_[p].two) stores_[p].slot[1] = take();
      }
    for (size_t p = 0; p < planes_.size(); ++p)
      if (stores_[p].used && last[p] == s)
        for (int slot : stores_[p].slot)
          if (slot >= 0) free.push_back(slot);
  }
  memory_.resize(slots);
}

void Network::plan_block(int step) {
  const StepData& s = steps_[step];
  BlockPlan& block = blocks_[step];
  const int n = static_cast<int>(s.layers.size());
  block.reach.assign(planes_.size(), -1);
  block.hidden.assign(planes_.size(), -1);
  std::vector<int> readers(planes_.size(), 0), last_read(planes_.size(), -1), out(n, 0);
  for (int i = n - 1; i >= 0; --i) {
    const LayerData& layer = s.layers[i];
    out[i] = i + 1 == n ? 0 : std::max(0, block.reach[layer.dst]);
    for (const PartData& p : layer.src) {
      block.reach[p.plane] = std::max(block.reach[p.plane], out[i] + layer.conv.kernel / 2);
      last_read[p.plane] = std::max(last_read[p.plane], i);
      ++readers[p.plane];
    }
    for (const PartData& p : layer.skip.parts) {
      block.reach[p.plane] = std::max(block.reach[p.plane], out[i]);
      last_read[p.plane] = std::max(last_read[p.plane], i);
      ++readers[p.plane];
    }
  }
  block.halo = block.reach[s.src];
  bool splits = false;  // tiles of a region may part within the block
  for (int i = 0; i < n; ++i) {
    Layer layer;
    layer.data = &s.layers[i];
    layer.conv = prepare(s.layers[i].conv, 1, false, false);
    layer.out = out[i];
    if (layer.data->conv.site.counted) {
      layer.column = block.sites++;
      site_bits_.push_back(layer.conv->site->bits[0]);
      if (layer.conv->site->bits.size() > 1 || layer.conv->own_range() || layer.conv->site->bits[0] == 0) dynamic_ = true;
    }
    block.own_range |= layer.conv->own_range();
    block.chooses_first |= i == 0 && layer.column == 0 && layer.conv->site->bits.size() > 1;
    splits |= i > 0 && layer.conv->site->bits.size() > 1;
    layer.skip = prepare_skip(*layer.data, &s.layers[0].conv.site, layer.conv->dst_channels);
    block.layers.push_back(std::move(layer));
  }
  std::vector<int> free;
  for (int i = 0; i + 1 < n; ++i) {
    Layer &layer = block.layers[i], &next = block.layers[i + 1];
    const int dst = layer.data->dst;
    layer.fused = readers[dst] == 1 && is_whole(next.data->src) && next.data->src[0].plane == dst && !next.conv->raw &&
                  next.conv->site->bits.size() == 1 && !next.conv->own_range() && !layer.skip.is_used() &&
                  !layer.data->rectify && !layer.conv->levels && !layer.conv->own_range();
    if (layer.fused) {
      link(*layer.conv, *next.conv);
    } else {
      if (free.empty()) free.push_back(block.buffers++);
      layer.hidden = block.hidden[dst] = free.back();
      free.pop_back();
    }
    for (size_t p = 0; p < planes_.size() && !splits; ++p)  // else the other parts read them later
      if (last_read[p] == i && block.hidden[p] >= 0) free.push_back(block.hidden[p]);
  }
  block.rolls = n == 2 && block.layers[0].fused && block.layers[0].conv->kind == Conv::kWinograd &&
                block.layers[1].conv->kind == Conv::kWinograd && is_whole(block.layers[0].data->src) &&
                block.layers[0].data->src[0].plane == s.src;
}

void Network::plan_group(Group& group, const std::vector<int>& steps) {
  std::vector<int> view_of(planes_.size(), -1), codes_of(planes_.size(), -1), readers(planes_.size(), 0);
  std::vector<Layer*> layer_of(steps_.size(), nullptr);
  std::vector<int> reader(planes_.size(), -1);
  auto is_layer = [&](int i) { return steps_[i].kind == StepData::kLayer; };
  for (int i : steps) {
    if (steps_[i].kind == StepData::kImageOut) {
      ++readers[steps_[i].src];
      reader[steps_[i].src] = i;
    }
    for (const LayerData& layer : steps_[i].layers) {
      for (const PartData& p : layer.src) {
        // Other than whole planes are quantised from int16 values.
        readers[p.plane] += is_whole(layer.src) ? 1 : 2;
        reader[p.plane] = i;
      }
      for (const PartData& p : layer.skip.parts) readers[p.plane] += 2;
    }
  }
  auto add_view = [&](int channels, int element, int pad, uint8_t zero, int level) {
    group.views.push_back(std::make_unique<View>());
    View& v = *group.views.back();
    v.channels = channels;
    v.element = element;
    v.pad = pad;
    v.zero = zero;
    v.width = v.height = level;  // multiplied by the image's size later
    return static_cast<int>(group.views.size()) - 1;
  };
  auto add_stage = [&](const std::string& name) {
    profile_.emplace_back(name, 0.0);
    return static_cast<int>(profile_.size()) - 1;
  };
  const int image = steps_[0].dst;
  auto takes_image = [&](int i) {  // reads the picture's plane as it is written
    const LayerData& layer = steps_[i].layers[0];
    return layer.src[0].plane == image && is_whole(layer.src) && !layer.conv.has_site && readers[image] == 1 &&
           !crosses(image);
  };
  for (int i : steps) {
    if (!is_layer(i)) continue;
    const LayerData& data = steps_[i].layers[0];
    const int dst = data.dst;
    const bool last = reader[dst] >= 0 && steps_[reader[dst]].kind == StepData::kImageOut;
    if (last && (readers[dst] != 1 || data.has_skip || data.rectify || data.conv.levels || crosses(dst)))
      throw std::invalid_argument("the output plane must be written by one layer, without a skip");
    if (!last && !data.borders.empty()) throw std::invalid_argument("border weights within a network");
    layers_.push_back(std::make_unique<Layer>());
    Layer& layer = *layers_.back();
    layer_of[i] = &layer;
    layer.data = &data;
    layer.conv = prepare(data.conv, data.shuffle, last, takes_image(i));
    layer.skip = prepare_skip(data, nullptr, layer.conv->dst_channels);
    for (const ConvData& border : data.borders) layer.borders.push_back(prepare(border, data.shuffle, last, false, false));
    if (!data.borders.empty() && (layer.conv->kind == Conv::kColumns || planes_[data.src[0].plane].level != 1))
      throw std::invalid_argument("border weights of a layer that is not at the input's size");
  }
  auto source = [&](const PartData& p, int offset, bool whole) {
    Source from;
    from.plane = crosses(p.plane) ? p.plane : -1;
    from.view = from.plane >= 0 ? -1 : view_of[p.plane];
    from.first = p.first;
    from.offset = offset;
    from.whole = whole;
    from.channels = p.channels;
    if (from.plane < 0 && from.view < 0) throw std::invalid_argument("a plane that exists as codes only");
    return from;
  };
  for (int i : steps) {
    const StepData& s = steps_[i];
    Node node;
    node.step = &s;
    if (s.kind == StepData::kImageOut) continue;  // the layer before it writes the image
    if (s.kind == StepData::kImageIn) {
      if (crosses(s.dst)) throw std::invalid_argument("the picture's plane is read behind a block");
      node.kind = Node::kImageIn;
      const int r = reader[s.dst];
      const bool direct = r >= 0 && is_layer(r) && takes_image(r);
      int& view = direct ? codes_of[s.dst] : view_of[s.dst];
      node.dst_view = view = add_view(planes_[s.dst].channels, 2, direct ? layer_of[r]->conv->pad : 0, 0, 1);
      node.profile = add_stage("image in");
      group.nodes.push_back(node);
      continue;
    }
    const Layer& layer = *layer_of[i];
    const LayerData& data = *layer.data;
    Conv* conv = layer.conv;
    node.layer = &layer;
    node.conv = conv;
    const int first = data.src[0].plane;
    const bool whole = is_whole(data.src);
    if (whole && codes_of[first] >= 0) {
      node.src_view = codes_of[first];
    } else {
      node.src_view = add_view(conv->c_in, conv->element, conv->pad, conv->raw ? 0 : conv->quantizer[0].flip,
                               planes_[first].level);
      int offset = 0;
      for (const PartData& p : data.src) {
        Node q;
        q.kind = Node::kQuantize;
        q.step = &s;
        q.conv = conv;
        q.source = source(p, offset, whole && p.plane != image);
        q.dst_view = node.src_view;
        q.profile = add_stage("quantize");
        group.nodes.push_back(q);
        offset += p.channels;
      }
    }
    node.profile = add_stage("layer " + std::to_string(conv->kernel) + "x" + std::to_string(conv->kernel) + " " +
                             std::to_string(data.conv.c_in) + "->" + std::to_string(data.conv.c_out));
    if (data.has_skip) {
      int offset = 0;
      node.skip_direct = layer.skip.is_plain();
      for (const PartData& p : data.skip.parts) {
        node.skip.push_back(source(p, offset, false));
        offset += p.channels;
      }
    }
    const int r = reader[data.dst];
    if (r >= 0 && steps_[r].kind == StepData::kImageOut) {
      node.kind = Node::kImageOut;
      group.nodes.push_back(node);
      continue;
    }
    const bool only = r >= 0 && is_layer(r) && !crosses(data.dst) && readers[data.dst] == 1;
    Conv* next = only && !data.has_skip && !data.rectify && !conv->levels ? layer_of[r]->conv : nullptr;
    const int level = planes_[data.dst].level;
    if (next && !next->raw) {  // int16 values that are read as they are take a padded copy instead
      link(*conv, *next);
      for (Conv* border : layer.borders) link(*border, *next);
      node.next = next;
      node.dst_view = codes_of[data.dst] = add_view(next->c_in, next->element, next->pad, next->quantizer[0].flip, level);
    } else if (crosses(data.dst)) {
      node.dst_plane = data.dst;
    } else {
      node.dst_view = view_of[data.dst] = add_view(conv->dst_channels, 2, 0, 0, level);
    }
    group.nodes.push_back(node);
  }
}

// Rows each stage must have done after each strip, and the window of rows its result must keep.
void Network::schedule(Group& group) {
  auto& nodes = group.nodes;
  const int n = static_cast<int>(nodes.size());
  const int strip_rows = std::max(kStripRows / 2, std::min(kStripRows, kStripPixels / width_ / 4 * 4));
  group.strips = (height_ + strip_rows - 1) / strip_rows;
  std::vector<int> level(n, 1);
  for (int i = 0; i < n; ++i) {
    Node& node = nodes[i];
    if (node.src_view >= 0) level[i] = group.views[node.src_view]->height / height_;
    if (node.kind == Node::kQuantize) level[i] = group.views[node.dst_view]->height / height_;
    node.height = height_ * level[i];
    node.until.assign(group.strips, 0);
  }
  auto produces = [&](int i) { return nodes[i].kind == Node::kConv ? nodes[i].conv->shuffle : 1; };
  for (int strip = 0; strip < group.strips; ++strip) {
    std::vector<int> need(group.views.size(), 0);
    for (int i = n - 1; i >= 0; --i) {
      Node& node = nodes[i];
      int rows = std::min(node.height, (strip + 1) * strip_rows * level[i]);
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
      if (node.source.view >= 0) need[node.source.view] = std::max(need[node.source.view], rows);
      for (const Source& p : node.skip)
        if (p.view >= 0) need[p.view] = std::max(need[p.view], rows * node.conv->shuffle);
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
        if (node.source.view == static_cast<int>(v)) oldest = std::min(oldest, from);
        for (const Source& p : node.skip)
          if (p.view == static_cast<int>(v)) oldest = std::min(oldest, from * node.conv->shuffle);
      }
      capacity = std::max(capacity, newest - std::max(oldest, 0));
    }
    group.views[v]->capacity = std::min(group.views[v]->height, capacity);
  }
}

void Network::resize(const Image& in, int threads, int tile, const Sides& largest) {
  const int height = tile * largest.rows, width = tile * largest.columns;
  const bool same = tile == tile_ && in.height == height_ && in.width == width_ && in.wide == wide_ &&
                    height <= codes_height_ && width <= codes_width_;
  if (same && static_cast<int>(threads_.size()) >= threads) return;
  codes_height_ = height;
  codes_width_ = width;
  const int old_height = height_ ? height_ : 1, old_width = width_ ? width_ : 1;
  tile_ = tile;
  height_ = in.height;
  width_ = in.width;
  wide_ = in.wide;
  rows_ = (height_ + tile_ - 1) / tile_;
  columns_ = (width_ + tile_ - 1) / tile_;
  balanced_ = balanced_sides(threads, largest);
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
    for (int slot : s.slot)
      if (slot >= 0) memory_[slot].reserve(bytes);
  }
  for (Store& s : stores_) {  // buffers have moved while they grew
    if (!s.used) continue;
    for (int i = 0; i < 2; ++i) s.memory[i] = s.slot[i] < 0 ? nullptr : reinterpret_cast<int16_t*>(memory_[s.slot[i]].get());
    s.tiles.assign(static_cast<size_t>(rows_) * columns_, s.memory[0]);
    s.next = s.tiles;
  }
  gradients_.assign(static_cast<size_t>(rows_) * columns_ * 2, 0.0);
  taken_.resize(static_cast<size_t>(rows_) * columns_);
  threads_.resize(std::max<size_t>(threads_.size(), threads));
  int c_max = 32, halo = 0, buffers = 0;
  for (const BlockPlan& block : blocks_) {
    halo = std::max(halo, block.halo);
    buffers = std::max(buffers, block.buffers);
  }
  for (const auto& c : convs_) c_max = std::max({c_max, c->c_in, c->dst_channels});
  for (const auto& p : planes_) c_max = std::max(c_max, round_channels(p.channels));
  const int around = 2 * halo + kSlack;
  size_t area = static_cast<size_t>(height + around) * (width + around);
  if (rolls_) {
    area = 0;
    for (int w = 1; w <= width; ++w)
      area = std::max<size_t>(area, static_cast<size_t>(roll_rows(height, w) + kRollMore + 1) * (w + around));
  }
  const size_t bytes = area * c_max * 2;
  int level = 1;
  for (const auto& p : planes_) level = std::max(level, p.level);
  for (Thread& t : threads_) {
    t.kernel.reserve(kernels_->scratch_bytes(c_max));
    if (halo) {
      t.codes[0].reserve(bytes);
      t.codes[1].reserve(bytes);
      t.skip.reserve(bytes);
      t.hidden.resize(std::max<size_t>(t.hidden.size(), buffers));
      for (Buffer& b : t.hidden) b.reserve(bytes);
    }
    t.multiplier.resize(c_max);
    t.first_multiplier.resize(c_max);
    t.first_ratio.resize(c_max);
    t.factor.resize(round_up(c_max, 64));
    t.largest.resize(c_max);
    t.rows_out.reserve(static_cast<size_t>(width_ * level + kSlack) * 128);
    const size_t most = std::max(height + around, 4096) + 64;
    t.in.reserve(most);
    t.out.reserve(most);
    t.residual.reserve(most);
    t.parts.reserve(64);
    t.sums.assign(static_cast<size_t>(4) * c_max, 0);
    t.values.resize(planes_.size());
    t.inputs.assign(static_cast<size_t>(2) + c_max, 0);
  }
}

std::vector<std::pair<std::string, double>> Network::profile() const { return profile_; }

}  // namespace cadyq
