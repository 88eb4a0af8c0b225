// A plan prepared for one kernel set, and its execution. Equation and section numbers: docs/numerics.md.
#pragma once
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

struct SiteData {
  std::vector<int> bits;
  double step = 0;
  std::vector<float> multiplier;  // (K, C)
  std::vector<int> low, high;
  std::vector<double> weight, bias;  // empty: no selector
  double log_offset = 0;             // above 0: the selector's inputs are log(v + log_offset)
};

struct ConvData {
  int c_out = 0, kernel = 0, c_in = 0;
  std::vector<int8_t> weight;  // (C_out, k, k, C_in)
  std::vector<float> factor, bias, slope;
  bool has_site = false;
  SiteData site;
};

struct StepData {
  enum Kind { kImageIn, kLayer, kBlock, kImageOut } kind = kImageIn;
  int src = -1, dst = -1, residual = -1, shuffle = 1;
  bool add_source = false;
  std::vector<ConvData> convs;
  std::vector<float> multiplier8, multiplier16, offset;
  std::vector<uint8_t> table8;
  std::vector<uint16_t> table16;
};

struct PlaneData {
  int channels, level;
};

// ---- the plan as prepared ----

struct Conv {
  enum Kind { kWinograd, kDirect, kColumns } kind = kDirect;
  int kernel = 0, pad = 0, c_in = 0, c_out = 0, shuffle = 1, dst_channels = 0;  // padded, except for kColumns
  int store = CADYQ_CODE8;  // how its input codes are stored
  int element = 1;
  bool raw = false;  // reads int16 values themselves
  Buffer weights;
  std::vector<std::vector<float>> factor;  // per candidate
  std::vector<float> bias, slope;
  std::vector<std::vector<int32_t>> init;  // per candidate
  std::vector<CadyqQuantizer> quantizer;
  std::vector<std::vector<float>> multiplier;
  // For results that are quantised on the way out: the next convolution's multipliers, per own output channel.
  std::vector<std::vector<float>> requant;
  const SiteData* site = nullptr;

  int pixel_bytes() const { return c_in * element; }
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

// An int16 plane kept whole. Block planes have a second buffer; `tiles` says where each tile's values are.
struct Store {
  bool used = false, two = false;
  int height = 0, width = 0, channels = 0;
  Buffer memory[2];
  std::vector<const int16_t*> tiles, next;
};

// One stage of a group of layers that advance together by strips of rows.
struct Node {
  enum Kind { kImageIn, kQuantize, kConv, kImageOut } kind = kConv;
  const StepData* step = nullptr;
  Conv* conv = nullptr;            // the convolution, or the one whose codes are made
  const Conv* next = nullptr;      // the convolution that gets codes from this one
  int src_plane = -1, dst_plane = -1, residual_plane = -1;  // kept whole
  int src_view = -1, dst_view = -1, residual_view = -1;     // rolling
  int height = 0;                  // rows it produces (before PixelShuffle)
  int profile = 0;
  std::vector<int> until;          // rows done after each strip
};

struct Group {
  std::vector<Node> nodes;
  std::vector<std::unique_ptr<View>> views;
  int strips = 0;
  bool skips = false;  // writes the image and nothing that lasts: exited tiles need not be computed
  int margin = 0;      // input pixels beyond a tile that its result depends on
};

struct Segment {
  int block = -1;  // index of a block step, or
  Group group;     // a group of layers
  int first_site = 0;
  int profile = 0;
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
  struct Thread {
    Buffer kernel, codes[2], hidden, rows_out;
    std::vector<const uint8_t*> in;
    std::vector<uint8_t*> out;
    std::vector<const int16_t*> residual;
    std::vector<int64_t> sums;
    std::vector<double> inputs;  // of a selector
  };
  struct Tile {
    int index, y0, x0, y1, x1;
  };

  Conv* prepare(const ConvData& data, int shuffle, bool few_outputs, bool from_image);
  void pack(const ConvData& data, Conv& conv);
  void link(Conv& from, const Conv& to);
  void plan_group(Group& group, const std::vector<int>& steps, int segment);
  bool crosses(int plane) const;
  int padded(int plane) const;

  void resize(const Image& in, int threads, int tile);
  void schedule(Group& group);
  void gradients(Pool& pool, const Image& in);
  void run_group(Pool& pool, Group& group, const Image& in, void* out);
  void run_node(Pool& pool, Group& group, Node& node, int from, int to, const Image& in, void* out);
  void run_block(Pool& pool, const Segment& segment, const int8_t* forced, const uint8_t* exited, uint8_t* bits,
                 int8_t* choice);
  void run_tile(const Segment& segment, Tile tile, Thread& thread, const int8_t* forced, uint8_t* bits, int8_t* choice);
  int select(const SiteData& site, int tile, const int16_t* values, size_t pitch, int height, int width, int channels,
             Thread& thread) const;
  bool needed(int y0, int x0, int y1, int x1, int level, int margin) const;
  void settle(int plane);
  void copy_row(const Store& plane, int y, uint8_t* dst) const;
  void quantize_row(const Store& plane, int y, int x0, int x1, uint8_t* dst, const CadyqQuantizer& q, int store) const;
  void convolve(const Conv& conv, int k, const std::vector<const uint8_t*>& rows, int height, int width,
                const CadyqEpilogue& epilogue, const CadyqTarget& target, Thread& thread) const;
  CadyqEpilogue epilogue(const Conv& conv, int k, const Conv* next) const;

  const CadyqKernels* kernels_;
  int scale_, plan_tile_, tile_, n_sites_ = 0;
  std::vector<int> site_bits_;  // of the first candidates
  std::vector<PlaneData> planes_;
  std::vector<StepData> steps_;
  std::vector<std::unique_ptr<Conv>> convs_;
  std::vector<std::vector<Conv*>> block_convs_;  // by step
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
  bool wide_ = false, dynamic_ = false;
};

}  // namespace cadyq
