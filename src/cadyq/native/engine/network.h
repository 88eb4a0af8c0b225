// A plan prepared for one kernel set, and its execution. Equation and section numbers: docs/numerics.md.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace cadyq {

// Memory aligned to pages, zeroed when it grows.
class Buffer {
 public:
  uint8_t* reserve(size_t bytes);
  uint8_t* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

// ---- the plan as given ----

struct PartData {
  int plane, first, channels;
};

struct SiteData {
  std::vector<int> bits;
  double step = 0;
  bool counted = false;           // one of the body's: it has a column in the table of bits
  std::vector<float> multiplier;  // (K, C)
  std::vector<int> low, high;
  std::vector<double> weight, bias;  // empty: no selector
  double log_offset = 0;             // above 0: the selector's inputs are log(v + log_offset)
  std::vector<double> inverse_scale;  // not empty: the clip is the tile's own range; equation (15)
};

struct ConvData {
  int c_out = 0, kernel = 0, c_in = 0, groups = 1;
  std::vector<int8_t> weight;  // (C_out, k, k, C_in / groups)
  std::vector<float> factor, bias, slope;
  bool has_site = false;
  SiteData site;
  int levels = 0;           // above 0: results are codes first; equation (14)
  std::vector<float> gain;  // of these codes
};

struct SkipData {
  std::vector<PartData> parts;
  std::vector<float> ratio;  // (K, C), or empty
  bool has_site = false, shared = false;
  SiteData site;
};

struct LayerData {
  std::vector<PartData> src;
  int dst = -1, shuffle = 1;
  ConvData conv;
  bool has_skip = false, rectify = false;
  SkipData skip;
  std::vector<ConvData> borders;  // 15, or none
};

struct BaseData {
  std::vector<int32_t> weight;  // (scale, 5); empty: none
  bool symmetric = false;
  double gain8 = 0, gain16 = 0;
};

struct StepData {
  enum Kind { kImageIn, kLayer, kBlock, kImageOut } kind = kImageIn;
  int src = -1, dst = -1;        // of an image step or a block
  bool residual = false;         // a block's tiles may be skipped
  std::vector<LayerData> layers;  // one, or a block's
  std::vector<float> multiplier8, multiplier16, offset;
  std::vector<uint8_t> table8;
  std::vector<uint16_t> table16;
  BaseData base;
};

struct PlaneData {
  int channels, level;
};

// ---- the plan as prepared ----

struct Conv {
  enum Kind { kWinograd, kDirect, kColumns } kind = kDirect;
  int kernel = 0, pad = 0, c_in = 0, c_out = 0, shuffle = 1, dst_channels = 0;  // padded, except for kColumns
  int store = CADYQ_CODE8;  // how its input codes are stored
  int element = 1, weight_bytes = 1;
  bool raw = false;  // reads int16 values themselves
  Buffer weights;
  Buffer weights4;  // for four rows of pixels at once, by `columns4` or `winograd5`; or nothing
  std::vector<std::vector<float>> factor;  // per candidate
  std::vector<float> bias, slope, gain;
  int levels = 0;
  int slopes = CADYQ_FRACTIONS;
  std::vector<std::vector<int32_t>> init;  // per candidate
  std::vector<CadyqQuantizer> quantizer;
  std::vector<std::vector<float>> multiplier;
  // For results that are quantised on the way out: the next convolution's multipliers, per own output channel.
  std::vector<std::vector<float>> requant;
  double largest = 0;   // magnitude of a result before it is clamped
  bool covers = false;  // CadyqQuantizer's, for `requant`
  const SiteData* site = nullptr;

  int pixel_bytes() const { return c_in * element; }
  bool own_range() const { return site && !site->inverse_scale.empty(); }
};

// What is added to a layer's results; equation (14).
struct Skip {
  const SkipData* data = nullptr;
  bool shared = false;  // the codes of the block's first site
  std::vector<std::vector<float>> ratio, multiplier;  // per candidate
  std::vector<int> low, high;

  bool is_used() const { return data != nullptr; }
  bool is_plain() const { return ratio.empty(); }
  CadyqSnap snap(int k, size_t offset) const;
};

struct Layer {
  const LayerData* data = nullptr;
  Conv* conv = nullptr;
  std::vector<Conv*> borders;
  Skip skip;
  // within a block:
  int out = 0;          // pixels around the tile that are computed
  int hidden = -1;      // buffer that holds the result, if a later layer reads its values
  bool fused = false;   // writes the codes of the next layer instead
  int column = -1;      // of the table of bits, counted from the block's first
};

struct BlockPlan {
  std::vector<Layer> layers;
  std::vector<int> reach, hidden;  // by plane: pixels around the tile, buffer
  int halo = 0, sites = 0, buffers = 0;
  bool own_range = false;      // a site has the range of its tile
  bool chooses_first = false;  // the first layer's site has several candidates
  // Two layers by Winograd, of which the first writes the codes of the second: they advance together by strips of rows.
  bool rolls = false;
};

struct Box {
  int y0, x0, y1, x1;
  int height() const { return y1 - y0; }
  int width() const { return x1 - x0; }
};

// Values of a plane around a tile: rows of int16 from the box's first pixel on.
struct Hidden {
  int16_t* data = nullptr;
  int channels = 0;
  Box box{};
  int16_t* at(int y, int x) const {
    return data + (static_cast<size_t>(y - box.y0) * box.width() + (x - box.x0)) * channels;
  }
};

// Rows of pixels, all of the plane or a rolling window of it, with zero columns beside and zero rows beyond.
struct View {
  int height = 0, width = 0, channels = 0, element = 2, pad = 0, capacity = 0;
  uint8_t zero = 0;
  size_t pitch = 0;
  Buffer memory;
  uint8_t *base = nullptr, *empty = nullptr;

  void allocate();
  uint8_t* row(int y) const { return y < 0 || y >= height ? empty : base + static_cast<size_t>(y % capacity) * pitch; }
};

// An int16 plane kept whole. Planes that blocks update have a second buffer; `tiles` says where each tile's values are.
// Buffers are shared by planes that do not live at the same time.
struct Store {
  bool used = false, two = false;
  int height = 0, width = 0, channels = 0;
  int slot[2] = {-1, -1};
  int16_t* memory[2] = {nullptr, nullptr};
  std::vector<const int16_t*> tiles, next;
};

// Where channels of a plane are read from: kept whole, or a rolling window.
struct Source {
  int plane = -1, view = -1, first = 0, channels = 0, offset = 0;
  bool whole = false;  // all channels, padded ones included
};

// One stage of a group of layers that advance together by strips of rows.
struct Node {
  enum Kind { kImageIn, kQuantize, kConv, kImageOut } kind = kConv;
  const StepData* step = nullptr;
  const Layer* layer = nullptr;
  Conv* conv = nullptr;            // the convolution, or the one whose codes are made
  const Conv* next = nullptr;      // the convolution that gets codes from this one
  Source source;                   // of kQuantize
  std::vector<Source> skip;
  bool skip_direct = false;        // the only source's values are added as they are
  int dst_plane = -1;              // kept whole
  int src_view = -1, dst_view = -1;  // rolling
  int height = 0;                  // rows it produces (before PixelShuffle)
  int margin = 0;                  // pixels around computed tiles that it produces
  int profile = 0;
  std::vector<int> until;          // rows done after each strip
};

struct Group {
  std::vector<Node> nodes;
  std::vector<std::unique_ptr<View>> views;
  int strips = 0;
};

struct Segment {
  int block = -1;  // index of a block step, or
  Group group;     // a group of layers
  int first_site = 0;
  bool chosen = false, chooses_next = false;  // first choices: made by the block before; of the block behind it
  int profile = 0;
};

// Tiles that are computed as one.
struct Region {
  int row0, column0, row1, column1;
};

// Rows that the layers of a block advance by where they roll: the more the narrower a region is, as kernels work best on
// many pixels. Of the codes between the layers, kRollMore rows more are kept.
constexpr int kRollMore = 8;
inline int roll_rows(int height, int width) {
  return std::min(std::max(16, 4096 / width / 4 * 4), (height + 5) / 4 * 4);
}

// How many tiles a region has at most.
struct Sides {
  int rows = 1, columns = 1;
};

// Columns of some rows.
struct Span {
  int x0, x1;
};

struct Image {
  const void* data;
  int height, width;
  bool wide;  // uint16
};

class Network {
 public:
  Network(const CadyqKernels* kernels, int scale, int tile);

  void add_plane(int channels, int level) { planes_.push_back({channels, level}); }
  void add_step(StepData step) { steps_.push_back(std::move(step)); }
  // Throws std::invalid_argument for what the kernels cannot run.
  void finish();
  int sites() const { return n_sites_; }

  // forced, choice: (rows, columns, sites); exited: (rows, columns); bits as choice.
  void run(Pool& pool, const Image& in, void* out, const int8_t* forced, const uint8_t* exited, uint8_t* bits,
           int8_t* choice);
  const char* isa() const { return kernels_->name; }
  std::vector<std::pair<std::string, double>> profile() const;

 private:
  friend class RegionRun;
  struct Thread {
    Buffer kernel, codes[2], skip, rows_out, base;
    std::vector<Buffer> hidden;
    std::vector<Hidden> values;  // by plane, within a block
    std::vector<const uint8_t*> in;
    std::vector<uint8_t*> out;
    std::vector<const int16_t*> residual;
    std::vector<int64_t> sums;
    std::vector<double> inputs;  // of a selector
    std::vector<float> multiplier, factor, first_multiplier, first_ratio;  // of a tile's own range
    double clip = 1;
    std::vector<int32_t> largest;
    std::vector<Span> spans, row;
    std::vector<Region> parts;  // of regions whose tiles no longer choose alike, nested ones last
  };
  // The table of bits for one block: rows of tiles, from the block's first column on.
  struct Choices {
    const int8_t* forced;
    uint8_t* bits;
    int8_t* choice;
    size_t pitch;
    size_t at(int tile, int column) const { return tile * pitch + column; }
  };
  // A piece of a convolution within a group.
  struct Job {
    int y0, x0, height, width;
  };

  int round_channels(int channels) const;
  Conv* prepare(const ConvData& data, int shuffle, bool is_last, bool from_image, bool inside = true);
  Skip prepare_skip(const LayerData& data, const SiteData* first, int channels) const;
  void pack(const ConvData& data, Conv& conv, int64_t largest_sum, bool pixels);
  void link(Conv& from, const Conv& to);
  void find_stores(const std::vector<int>& segment_of, int segments);
  void share_buffers(const std::vector<int>& segment_of, int segments);
  void plan_block(int step);
  void plan_group(Group& group, const std::vector<int>& steps);
  bool crosses(int plane) const { return stores_[plane].used; }
  int padded(int plane) const { return round_channels(planes_[plane].channels); }
  bool is_whole(const std::vector<PartData>& parts) const;

  void resize(const Image& in, int threads, int tile, const Sides& largest);
  void schedule(Group& group);
  void find_margins();
  Box pixels(const Region& region) const {
    return {region.row0 * tile_, region.column0 * tile_, std::min(height_, region.row1 * tile_),
            std::min(width_, region.column1 * tile_)};
  }
  Region tile_region(int tile) const {
    const int row = tile / columns_, column = tile % columns_;
    return {row, column, row + 1, column + 1};
  }
  template <class F>
  void for_tiles(const Region& region, const F& f) const {
    for (int r = region.row0; r < region.row1; ++r)
      for (int c = region.column0; c < region.column1; ++c) f(r * columns_ + c);
  }
  // Appends rectangles of tiles that are equal by `key(tile)`, the largest first; those with a key below 0 are left
  // out. A region costs about what the pixels of it and of a ring around it do.
  template <class Key>
  void merge(const Region& within, const Sides& most, const Key& key, std::vector<Region>& out) {
    for_tiles(within, [&](int t) { taken_[t] = key(t) < 0; });
    auto is_free = [&](const Region& region) {
      const int first = key(region.row0 * columns_ + region.column0);
      for (int r = region.row0; r < region.row1; ++r)
        for (int t = r * columns_ + region.column0; t < r * columns_ + region.column1; ++t)
          if (taken_[t] || key(t) != first) return false;
      return true;
    };
    auto take = [&](int height, int width) {
      for (int r = within.row0; r + height <= within.row1; ++r)
        for (int c = within.column0; c + width <= within.column1; ++c) {
          const Region region{r, c, r + height, c + width};
          if (!is_free(region)) continue;
          for_tiles(region, [&](int t) { taken_[t] = 1; });
          out.push_back(region);
        }
    };
    for (int area = most.rows * most.columns; area > 0; --area)
      for (int height = most.rows; height > 0; --height)
        if (area % height == 0 && area / height <= most.columns) take(height, area / height);
  }
  Sides largest_sides(int tile) const;
  Sides balanced_sides(int threads, const Sides& largest) const;
  void find_regions(int block, const uint8_t* exited, const Choices& choices);
  void gradients(Pool& pool, const Image& in);
  void run_group(Pool& pool, Group& group, const Image& in, void* out);
  void run_node(Pool& pool, Group& group, Node& node, int from, int to, const Image& in, void* out);
  void run_image_in(Pool& pool, Group& group, const Node& node, int from, int to, const Image& in);
  void run_quantize(Pool& pool, Group& group, const Node& node, int from, int to);
  void run_conv(Pool& pool, Group& group, const Node& node, int from, int to);
  void run_image_out(Pool& pool, Group& group, const Node& node, int from, int to, const Image& in, void* out);
  void image_span(const Node& node, const View& src, int x0, int x1, int y, int height, const Image& in, void* out, Thread& thread);
  int16_t* enlarged(const BaseData& base, const Image& in, int y, int x0, int x1, Thread& thread) const;
  void skip_rows(Group& group, const Node& node, int y0, int y1, int x0, int x1, Thread& thread);
  void run_block(Pool& pool, const Segment& segment, const int8_t* forced, const uint8_t* exited, uint8_t* bits,
                 int8_t* choice);
  void keep(const StepData& step, int tile);
  // Which buffer a tile's result goes to.
  bool is_second(const StepData& step, int tile) const {
    const Store& dst = stores_[step.dst];
    return dst.two && step.src == step.dst && dst.memory[0] == dst.tiles[tile];
  }
  int select(const SiteData& site, int tile, int64_t pixels, Thread& thread) const;
  void own_range(const Conv& conv, int k, Thread& thread) const;
  void spans(int y0, int y1, int level, int margin, std::vector<Span>& out) const;
  void settle(int plane);
  // Calls f(source pixel, first x, pixels) for the pieces of a row of a plane that lie in one buffer.
  template <class F>
  void for_pieces(const Store& plane, int y, int x0, int x1, const F& f) const {
    const int16_t* const* tiles = plane.tiles.data() + static_cast<size_t>(y / tile_) * columns_;
    for (int x = x0; x < x1;) {
      int column = x / tile_;
      const int16_t* base = tiles[column];
      while (++column * tile_ < x1 && tiles[column] == base) {}
      const int end = std::min(x1, column * tile_);
      f(base + (static_cast<size_t>(y) * plane.width + x) * plane.channels, x, end - x);
      x = end;
    }
  }
  void convolve(const Conv& conv, int k, const std::vector<const uint8_t*>& rows, int height, int width,
                const CadyqEpilogue& epilogue, const CadyqTarget& target, Thread& thread) const;
  CadyqEpilogue epilogue(const Conv& conv, int k, const Conv* next, bool rectify) const;

  const CadyqKernels* kernels_;
  int scale_, plan_tile_, tile_, n_sites_ = 0;
  std::vector<int> site_bits_;  // of the first candidates
  std::vector<PlaneData> planes_;
  std::vector<StepData> steps_;
  std::vector<std::unique_ptr<Conv>> convs_;
  std::vector<BlockPlan> blocks_;                // by step
  std::vector<std::unique_ptr<Layer>> layers_;   // of groups
  std::vector<Buffer> memory_;                   // shared by stores
  std::vector<Segment> segments_;
  std::vector<Store> stores_;
  std::vector<Thread> threads_;
  std::vector<double> gradients_;
  std::vector<int64_t> gradient_sums_;
  // stand-ins for the caller's arrays, where the working tiles are not the plan's
  std::vector<int8_t> free_, own_choice_;
  std::vector<uint8_t> none_, own_bits_;
  std::vector<std::pair<std::string, double>> profile_;
  int height_ = 0, width_ = 0, rows_ = 0, columns_ = 0;
  const uint8_t* exited_ = nullptr;  // during a run, where some are
  Sides balanced_, most_;            // of the largest region: that occupies the threads, in this run
  int codes_height_ = 0, codes_width_ = 0;  // of what buffers hold, in pixels
  std::vector<Region> regions_;
  std::vector<uint8_t> taken_;       // tiles that lie in a region already
  std::vector<Job> jobs_;
  bool wide_ = false, dynamic_ = false, rolls_ = false;  // the last: all blocks do
};

}  // namespace cadyq
