// Kernels for AMX: products of 8-bit tiles by tdpbusd; what is no product of matrices is AVX-512's.
//
// A tile register holds 16 rows of 64 bytes. Inputs: 16 neighboring pixels times 64 bytes of a kernel row's run, read
// where the codes lie. Weights: 16 groups of four inputs times 16 outputs, packed as vpdpbusd wants them. Results: 16
// pixels times 16 outputs. A region whose width is no multiple of 16 ends with a tile that overlaps the one before, so
// that no pixel beyond it is read; a region narrower than 16 gets shorter tiles.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "simd_avx512.h"

namespace cadyq_avx512 {
namespace {

#include "column_values.inl.h"
#include "epilogue.inl.h"

constexpr int kBlock = 32, kRows = 16;     // outputs of a block, pixels of a tile
constexpr size_t kPitch = kBlock * 4;      // bytes from one pixel's accumulators to the next one's, and of a weight row
constexpr int kChunkBytes = 64;            // of a run, one tile wide

// Tiles 0 to 3 hold results, 4 and 6 inputs, 5 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfig(int pixels) {
    for (int t = 0; t < 8; ++t) {
      column_bytes[t] = 64;
      rows[t] = static_cast<uint8_t>(t < 4 || t % 2 == 0 ? pixels : kRows);
    }
  }
};

// Tiles are set up for a kernel's run and given back after it: a thread that holds some is dearer to switch.
class Tiles {
 public:
  explicit Tiles(int pixels) {
    const TileConfig config(pixels);
    asm volatile("" : : "r"(&config) : "memory");  // GCC 12 believes that only the first eight bytes are read
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The inputs of a product: pixels of `rows`, each row of the kernel a run of `chunks` times 64 bytes.
struct Inputs {
  const uint8_t* const* rows;
  int n_rows, chunks;
  size_t pixel;  // bytes from one pixel to the next
  const int8_t* weights;
};

// Pixels of a row from `at` on, as one tile, or as two times 32 outputs, or as four times 16. The row's last tile begins
// before its first new pixel if need be. A tile's accumulators lie where those of its first pixel do: overlaps agree.
struct Group {
  int tiles, first[4];
  CADYQ_INLINE Group(int at, int width, int most) {
    const int last = width > kRows ? width - kRows : 0;
    tiles = width - at > kRows ? most : 1;
    for (int t = 0; t < 4; ++t) first[t] = at + t * kRows < last ? at + t * kRows : last;
  }
};

// Products of signed or unsigned codes are new, or are added to what the accumulators hold.
#define CADYQ_START(c, from)        \
  if constexpr (Added)              \
    _tile_loadd(c, (from), kPitch); \
  else                              \
    _tile_zero(c);
#define CADYQ_DOT(c, a, b)   \
  if constexpr (Signed)      \
    _tile_dpbssd(c, a, b);   \
  else                       \
    _tile_dpbusd(c, a, b);

// Two tiles of pixels times 32 outputs. `between` is called after every four products.
template <bool Signed, bool Added, class Between>
CADYQ_INLINE void product_2x2(const Inputs& in, const Group& g, int32_t* acc, const Between& between) {
  const size_t x0 = g.first[0] * in.pixel, x1 = g.first[1] * in.pixel;
  int32_t* behind = acc + static_cast<size_t>(g.first[1] - g.first[0]) * kBlock;
  CADYQ_START(0, acc)
  CADYQ_START(1, acc + 16)
  CADYQ_START(2, behind)
  CADYQ_START(3, behind + 16)
  const int8_t* w = in.weights;
  for (int r = 0; r < in.n_rows; ++r) {
    const uint8_t* row = in.rows[r];
    for (int c = 0; c < in.chunks; ++c, row += kChunkBytes, w += 16 * kPitch) {
      _tile_loadd(4, row + x0, in.pixel);
      _tile_loadd(5, w, kPitch);
      CADYQ_DOT(0, 4, 5)
      _tile_loadd(7, w + 64, kPitch);
      CADYQ_DOT(1, 4, 7)
      _tile_loadd(6, row + x1, in.pixel);
      CADYQ_DOT(2, 6, 5)
      CADYQ_DOT(3, 6, 7)
      between();
    }
  }
  _tile_stored(0, acc, kPitch);
  _tile_stored(1, acc + 16, kPitch);
  _tile_stored(2, behind, kPitch);
  _tile_stored(3, behind + 16, kPitch);
}

// Four tiles of pixels times 16 outputs.
template <bool Signed, bool Added, class Between>
CADYQ_INLINE void product_4x1(const Inputs& in, const Group& g, int32_t* acc, const Between& between) {
  const size_t pixel = in.pixel, x0 = g.first[0] * pixel, x1 = g.first[1] * pixel, x2 = g.first[2] * pixel,
               x3 = g.first[3] * pixel;
  int32_t* to[4];
  for (int t = 0; t < 4; ++t) to[t] = acc + static_cast<size_t>(g.first[t] - g.first[0]) * kBlock;
  CADYQ_START(0, to[0])
  CADYQ_START(1, to[1])
  CADYQ_START(2, to[2])
  CADYQ_START(3, to[3])
  const int8_t* w = in.weights;
  for (int r = 0; r < in.n_rows; ++r) {
    const uint8_t* row = in.rows[r];
    for (int c = 0; c < in.chunks; ++c, row += kChunkBytes, w += 16 * kPitch) {
      _tile_loadd(5, w, kPitch);
      _tile_loadd(4, row + x0, pixel);
      CADYQ_DOT(0, 4, 5)
      _tile_loadd(6, row + x1, pixel);
      CADYQ_DOT(1, 6, 5)
      _tile_loadd(4, row + x2, pixel);
      CADYQ_DOT(2, 4, 5)
      _tile_loadd(6, row + x3, pixel);
      CADYQ_DOT(3, 6, 5)
      between();
    }
  }
  _tile_stored(0, to[0], kPitch);
  _tile_stored(1, to[1], kPitch);
  _tile_stored(2, to[2], kPitch);
  _tile_stored(3, to[3], kPitch);
}

// One tile of pixels times 16 or 32 outputs.
template <bool Signed, bool Added, bool Two, class Between>
CADYQ_INLINE void product_1(const Inputs& in, const Group& g, int32_t* acc, const Between& between) {
  const size_t x0 = g.first[0] * in.pixel;
  CADYQ_START(0, acc)
  if constexpr (Two) {
    CADYQ_START(1, acc + 16)
  }
  const int8_t* w = in.weights;
  for (int r = 0; r < in.n_rows; ++r) {
    const uint8_t* row = in.rows[r];
    for (int c = 0; c < in.chunks; ++c, row += kChunkBytes, w += 16 * kPitch) {
      _tile_loadd(4, row + x0, in.pixel);
      _tile_loadd(5, w, kPitch);
      CADYQ_DOT(0, 4, 5)
      if constexpr (Two) {
        _tile_loadd(7, w + 64, kPitch);
        CADYQ_DOT(1, 4, 7)
      }
      between();
    }
  }
  _tile_stored(0, acc, kPitch);
  if constexpr (Two) _tile_stored(1, acc + 16, kPitch);
}

template <bool Signed, bool Added, class Between>
CADYQ_INLINE void product(const Inputs& in, const Group& g, int outputs, int32_t* acc, const Between& between) {
  if (g.tiles == 4) return product_4x1<Signed, Added>(in, g, acc, between);
  if (g.tiles == 2) return product_2x2<Signed, Added>(in, g, acc, between);
  if (outputs > 16) return product_1<Signed, Added, true>(in, g, acc, between);
  product_1<Signed, Added, false>(in, g, acc, between);
}

// What is added to results: nothing, values, codes with as many levels below 0 as above, or values of another grid.
enum class Residual { kNone, kValues, kCodes, kOther };

// Accumulators that wait for their epilogue: while the next ones are multiplied, four pixels are finished after every
// few products. There is a form of its own for full blocks, whose outputs lie side by side in the target.
class Waiting {
  using Step = void (*)(Waiting&);

 public:
  Waiting(const CadyqEpilogue& e, const CadyqTarget& target, int height)
      : e_(e), target_(target), store_(e, target), height_(height) {
    const CadyqSnap* snap = target.snap;
    const Residual kind = !target.residual                               ? Residual::kNone
                          : !snap                                        ? Residual::kValues
                          : snap->multiplier && snap->low == -snap->high ? Residual::kCodes
                                                                         : Residual::kOther;
    const bool is_code = e.store == CADYQ_CODE8, is_unsigned = is_code && e.quantizer.is_unsigned;
    const bool plain = (!is_code || e.quantizer.covers) && e.slopes != CADYQ_ANY;
    if (target.channels % kBlock || !plain || e.store == CADYQ_CODE16)
      full_ = any;
    else if (!is_code)
      full_ = e.gain ? (e.slope ? values_for<true, true>(kind) : values_for<false, true>(kind))
                     : (e.slope ? values_for<true, false>(kind) : values_for<false, false>(kind));
    else if (is_unsigned)  // has no other codes for what is negative
      full_ = e.slope && e.slopes != CADYQ_ZEROS ? codes<true, true> : codes<false, true>;
    else
      full_ = e.slope ? codes<true, false> : codes<false, false>;
  }

  // Whether pixels below each other can be finished like pixels side by side.
  bool takes_columns(int outputs) const {
    if (outputs % kBlock || full_ == any || target_.residual || target_.shuffle != 1) return false;
    for (int y = 2; y < height_; ++y)
      if (target_.rows[y] - target_.rows[y - 1] != target_.rows[1] - target_.rows[0]) return false;
    return true;
  }

  // Pixels x to x + pixels - 1 of row y; some more can be read.
  void set(const int32_t* acc, int y, int x, int pixels, int channel, int outputs) {
    acc_ = acc, y_ = y, x_ = x, pixels_ = pixels, channel_ = channel, outputs_ = outputs, done_ = 0;
    step_ = outputs == kBlock ? full_ : any;
    const int sub = channel / target_.channels, r = target_.shuffle, row = y * r + sub / r;
    stride_ = static_cast<size_t>(r) * target_.channels;
    const size_t offset = (static_cast<size_t>(x) * r + sub % r) * target_.channels + channel % target_.channels;
    to_ = target_.rows[row] + offset * (e_.store == CADYQ_CODE8 ? 1 : 2);
    residual_ = target_.residual ? target_.residual[row] + offset : nullptr;
    // Whole planes do not fit into the caches: the next row's part is fetched while this one is written.
    const int below = y + 1 < height_ ? row + r : row;
    to_ahead_ = target_.rows[below] - target_.rows[row];
    residual_ahead_ = residual_ ? target_.residual[below] - target_.residual[row] : 0;
  }
  // Pixels y to y + pixels - 1 of column x.
  void set_column(const int32_t* acc, int y, int x, int pixels, int channel) {
    set(acc, y, x, pixels, channel, kBlock);
    stride_ = static_cast<size_t>(target_.rows[1] - target_.rows[0]) / (e_.store == CADYQ_CODE8 ? 1 : 2);
    to_ahead_ = 0;
  }
  CADYQ_INLINE void step() {
    if (done_ < pixels_) step_(*this);
  }
  void finish() {
    while (done_ < pixels_) step_(*this);
  }

 private:
  static void any(Waiting& w) {
    const int left = w.pixels_ - w.done_;
    for (int c = 0; c < w.outputs_; c += kLanes) {
      const int32_t* from = w.acc_ + static_cast<size_t>(w.done_) * kBlock + c;
      const I32 v[4] = {load32(from), load32(from + kBlock), load32(from + 2 * kBlock), load32(from + 3 * kBlock)};
      w.store_(w.y_, w.x_ + w.done_, w.channel_ + c, left < 4 ? left : 4, v, 1.0f);
    }
    w.done_ += 4;
  }

  // Equation (7) for 16 channels of four pixels.
  template <bool Slope>
  CADYQ_INLINE void affine(int c, F32 t[4]) const {
    const int32_t* from = acc_ + static_cast<size_t>(done_) * kBlock + c;
    const F32 factor = load_f32(e_.factor + channel_ + c), bias = load_f32(e_.bias + channel_ + c);
    for (int i = 0; i < 4; ++i) t[i] = add(mul(to_f32(load32(from + i * kBlock)), factor), bias);
    if constexpr (Slope) {
      const F32 slope = load_f32(e_.slope + channel_ + c);
      for (int i = 0; i < 4; ++i) t[i] = _mm512_max_ps(t[i], mul(t[i], slope));
    }
  }

  template <bool Slope, bool Unsigned>
  static void codes(Waiting& w) {
    I32 v[2][4];  // two pixels each, first and second half of the channels
    for (int half = 0; half < 2; ++half) {
      F32 t[4];
      w.affine<Slope>(half * kLanes, t);
      const F32 m = load_f32(w.e_.quantizer.multiplier + w.channel_ + half * kLanes);
      for (int i = 0; i < 4; ++i) v[i / 2][i % 2 * 2 + half] = rint32(mul(rounded(t[i]), m));
    }
    uint8_t* to = w.to_ + w.done_ * w.stride_;
    const int left = w.pixels_ - w.done_;
    for (int i = 0; i < 2; ++i, to += 2 * w.stride_) {
      const __m512i k = pack_codes<Unsigned>(v[i], w.store_.clamp);
      if (left > 2 * i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(k));
      if (left > 2 * i + 1) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + w.stride_), _mm512_extracti64x4_epi64(k, 1));
    }
    w.done_ += 4;
  }

  // Clamped to [-most, most]: of the two the one of smaller magnitude, with the first one's sign.
  CADYQ_INLINE static F32 clamped(F32 t, F32 most) { return _mm512_range_ps(t, most, 2); }

  // Everything is read before anything is written: stores could change it for all that the compiler knows.
  template <bool Slope, bool Gain, Residual Kind>
  static void values(Waiting& w) {
    F32 first[4], second[4];
    w.affine<Slope>(0, first);
    w.affine<Slope>(kLanes, second);
    if constexpr (Gain) {
      const F32 most = splat(w.e_.levels);
      const float* gain = w.e_.gain + w.channel_;
      for (F32& t : first) t = mul(clamped(rounded(t), most), load_f32(gain));
      for (F32& t : second) t = mul(clamped(rounded(t), most), load_f32(gain + kLanes));
    }
    int16_t* to = reinterpret_cast<int16_t*>(w.to_) + w.done_ * w.stride_;
    const __m512i least = _mm512_set1_epi16(w.e_.rectify ? 0 : -32768);
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const int16_t* residual = w.residual_ ? w.residual_ + w.done_ * w.stride_ : nullptr;
    const ptrdiff_t to_ahead = w.to_ahead_, residual_ahead = w.residual_ahead_;
    const size_t stride = w.stride_;
    F32 m[2], ratio[2], low, high;
    if constexpr (Kind == Residual::kCodes || Kind == Residual::kOther) {
      const CadyqSnap& s = *w.target_.snap;
      const int c = w.channel_ % w.target_.channels;
      for (int half = 0; half < 2; ++half) {
        m[half] = s.multiplier ? load_f32(s.multiplier + c + half * kLanes) : splat(1.f);
        ratio[half] = load_f32(s.ratio + c + half * kLanes);
      }
      low = splat(s.multiplier ? static_cast<float>(s.low) : -32768.f);
      high = splat(s.multiplier ? static_cast<float>(s.high) : 32767.f);
    }
    const int n = w.pixels_ - w.done_ < 4 ? w.pixels_ - w.done_ : 4;
    w.done_ += 4;
    for (int i = 0; i < 4; ++i, to += stride) {
      if (i == n) break;
      if (Kind != Residual::kNone && i) residual += stride;
      __m512i r = _mm512_packs_epi32(rint32(first[i]), rint32(second[i]));
      _mm_prefetch(reinterpret_cast<const char*>(to) + to_ahead, _MM_HINT_T0);
      if constexpr (Kind != Residual::kNone) prefetch(residual + residual_ahead);
      if constexpr (Kind == Residual::kCodes || Kind == Residual::kOther) {  // equation (14)
        I32 v[2];
        for (int half = 0; half < 2; ++half) {
          F32 t = mul(load16_f32(residual + half * kLanes), m[half]);
          t = Kind == Residual::kCodes ? clamped(rounded(t), high) : round_clamped(t, low, high);
          v[half] = rint32(mul(t, ratio[half]));
        }
        r = _mm512_adds_epi16(r, _mm512_packs_epi32(v[0], v[1]));
      }
      r = _mm512_permutexvar_epi64(order, r);
      if constexpr (Kind == Residual::kValues) r = _mm512_adds_epi16(r, _mm512_loadu_si512(residual));
      _mm512_storeu_si512(to, _mm512_max_epi16(r, least));
    }
  }

  template <bool Slope, bool Gain>
  static Step values_for(Residual kind) {
    switch (kind) {
      case Residual::kNone: return values<Slope, Gain, Residual::kNone>;
      case Residual::kValues: return values<Slope, Gain, Residual::kValues>;
      case Residual::kCodes: return values<Slope, Gain, Residual::kCodes>;
      default: return values<Slope, Gain, Residual::kOther>;
    }
  }

  const CadyqEpilogue& e_;
  const CadyqTarget& target_;
  const EpilogueStore store_;
  Step full_;
  Step step_ = any;
  const int32_t* acc_ = nullptr;
  uint8_t* to_ = nullptr;
  const int16_t* residual_ = nullptr;
  size_t stride_ = 0;
  ptrdiff_t to_ahead_ = 0, residual_ahead_ = 0;
  const int height_;
  int y_ = 0, x_ = 0, pixels_ = 0, channel_ = 0, outputs_ = 0, done_ = 0;
};

// Low (unsigned) and high (signed) bytes of int16 values.
CADYQ_INLINE void split(const int16_t* src, size_t n, uint8_t* low, uint8_t* high) {
  for (size_t i = 0; i < n; i += 32) {
    const __m512i v = _mm512_loadu_si512(src + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i), _mm512_cvtepi16_epi8(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i), _mm512_cvtepi16_epi8(_mm512_srli_epi16(v, 8)));
  }
}

constexpr int kSegment = 128;    // pixels of a row whose int16 values are split at once
constexpr int kMaxKernel = CADYQ_MAX_SPLIT_KERNEL;
constexpr size_t kAccumulators = (4 * kRows + 4) * kBlock;  // those of pixels that fill up four are read, not used

// Products, group by group along rows; while one is made, the results of the one before are finished.
class Pipeline {
 public:
  Pipeline(const CadyqEpilogue& epilogue, const CadyqTarget& target, int height, int32_t* scratch)
      : waiting_(epilogue, target, height), acc_{scratch, scratch + kAccumulators} {}
  ~Pipeline() { waiting_.finish(); }

  // Codes: one product. The region's column `x` is the rows' first pixel.
  template <bool Signed>
  void codes(const Inputs& in, int y, int x, int width, int channel, int outputs) {
    groups(width, outputs, [&](const Group& g, int32_t* acc, const auto& between) {
      product<Signed, false>(in, g, outputs, acc, between);
    }, [&](const int32_t* acc, int at, int n) { waiting_.set(acc, y, x + at, n, channel, outputs); });
  }
  // Column x: `in.rows` begin at it, and `in.pixel` leads from one row to the next.
  template <bool Signed>
  void column(const Inputs& in, int x, int height, int channel) {
    groups(height, kBlock, [&](const Group& g, int32_t* acc, const auto& between) {
      product<Signed, false>(in, g, kBlock, acc, between);
    }, [&](const int32_t* acc, int at, int n) { waiting_.set_column(acc, at, x, n, channel); });
  }
  bool takes_columns(int outputs) const { return waiting_.takes_columns(outputs); }
  // Values v = 256 * high + low: the product with `high` is shifted, and that with `low` goes on from there.
  void values(const Inputs& low, const Inputs& high, int y, int x, int width, int channel, int outputs) {
    groups(width, outputs, [&](const Group& g, int32_t* acc, const auto& between) {
      product<true, false>(high, g, outputs, acc, between);
      const int pixels = g.first[g.tiles - 1] + kRows - g.first[0];
      for (int p = 0; p < pixels; ++p)
        for (int c = 0; c < outputs; c += kLanes) {
          int32_t* at = acc + static_cast<size_t>(p) * kBlock + c;
          _mm512_storeu_si512(at, shl32<8>(load32(at)));
        }
      product<false, true>(low, g, outputs, acc, between);
    }, [&](const int32_t* acc, int at, int n) { waiting_.set(acc, y, x + at, n, channel, outputs); });
  }

 private:
  template <class Multiply, class Finish>
  CADYQ_INLINE void groups(int width, int outputs, const Multiply& multiply, const Finish& finish) {
    const int most = outputs > 16 ? 2 : 4;
    for (int at = 0, n; at < width; at += n) {
      const Group g(at, width, most);
      n = width - at < g.tiles * kRows ? width - at : g.tiles * kRows;
      int32_t* acc = acc_[turn_];
      turn_ ^= 1;
      multiply(g, acc, [&] { waiting_.step(); });
      waiting_.finish();
      finish(acc + static_cast<size_t>(at - g.first[0]) * kBlock, at, n);
    }
  }

  Waiting waiting_;
  int32_t* acc_[2];
  int turn_ = 0;
};

// Length of the next piece of a row with `left` pixels: none is shorter than a tile, unless the row is.
CADYQ_INLINE int piece(int left) {
  return left <= kSegment ? left : left < kSegment + kRows ? left - kRows : kSegment;
}

// The last columns of a region, if they are few: tiles of 16 pixels below each other leave less unused than such side by
// side. A tile of the plan has a ring of hidden pixels around it: 34 pixels are two tiles and two columns.
int columns_apart(const CadyqDirect& job, const Pipeline& pipeline) {
  const int few = job.width % kRows, tiles = (job.height + kRows - 1) / kRows;
  if (job.width < kRows || job.height < kRows || job.kernel > kMaxKernel || few == 0 || few * tiles * 4 > job.height * 3)
    return 0;
  for (int y = 2; y < job.height + job.kernel - 1; ++y)
    if (job.rows[y] - job.rows[y - 1] != job.rows[1] - job.rows[0]) return 0;
  return pipeline.takes_columns(job.c_out) ? few : 0;
}

void direct(const CadyqDirect* job, void* scratch) {
  if (job->weight_bytes != 1) return cadyq_kernels_avx512vnni()->direct(job, scratch);
  uint8_t* p = static_cast<uint8_t*>(scratch);
  const Tiles tiles(job->width < kRows ? job->width : kRows);
  Pipeline pipeline(job->epilogue, job->target, job->height, reinterpret_cast<int32_t*>(p));
  p += 2 * kAccumulators * 4;
  const size_t pixel = static_cast<size_t>(job->pixel_bytes) / job->element;
  const int chunks = (job->run_bytes / job->element + kChunkBytes - 1) / kChunkBytes, k = job->kernel;
  const size_t block_bytes = static_cast<size_t>(k) * chunks * kChunkBytes * kBlock;
  auto for_blocks = [&](const auto& f) {
    for (int block = 0; block < job->c_out; block += kBlock)
      f(block, job->c_out - block < kBlock ? job->c_out - block : kBlock,
        static_cast<const int8_t*>(job->weights) + block / kBlock * block_bytes);
  };
  if (job->element == 1) {
    const int apart = columns_apart(*job, pipeline);
    const int width = job->width - apart;
    const uint8_t* rows[kMaxKernel];
    for_blocks([&](int block, int outputs, const int8_t* w) {
      for (int y = 0; y < job->height; ++y) {
        const Inputs in{job->rows + y, k, chunks, pixel, w};
        if (job->is_signed)
          pipeline.codes<true>(in, y, 0, width, block, outputs);
        else
          pipeline.codes<false>(in, y, 0, width, block, outputs);
      }
      for (int x = width; x < job->width; ++x) {
        for (int i = 0; i < k; ++i) rows[i] = job->rows[i] + x * pixel;
        const Inputs in{rows, k, chunks, static_cast<size_t>(job->rows[1] - job->rows[0]), w};
        if (job->is_signed)
          pipeline.column<true>(in, x, job->height, block);
        else
          pipeline.column<false>(in, x, job->height, block);
      }
    });
    return;
  }
  // The rows of a piece, split; each is used by `k` rows of results.
  const size_t room = static_cast<size_t>(kSegment + k - 1) * pixel + kChunkBytes;
  uint8_t* halves[2] = {p, p + k * room};
  const uint8_t* rows[2][kMaxKernel];
  for (int x = 0, n; x < job->width; x += n) {
    n = piece(job->width - x);
    int ready = 0;
    for (int y = 0; y < job->height; ++y) {
      for (; ready < y + k; ++ready) {
        const size_t to = static_cast<size_t>(ready % k) * room;
        const auto* from = reinterpret_cast<const int16_t*>(job->rows[ready]) + static_cast<size_t>(x) * pixel;
        split(from, static_cast<size_t>(n + k - 1) * pixel, halves[0] + to, halves[1] + to);
      }
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < k; ++i) rows[half][i] = halves[half] + static_cast<size_t>((y + i) % k) * room;
      for_blocks([&](int block, int outputs, const int8_t* w) {
        pipeline.values({rows[0], k, chunks, pixel, w}, {rows[1], k, chunks, pixel, w}, y, x, n, block,
                        outputs);
      });
    }
  }
}

void columns(const CadyqColumns* job, void* scratch) {
  if (job->element != 1) return cadyq_kernels_avx512vnni()->columns(job, scratch);
  int32_t* partial = static_cast<int32_t*>(scratch);  // [kSegment + kernel - 1][kBlock]
  const int k = job->kernel, carry = k - 1, total = job->width + carry;
  const size_t pixel = job->pixel_bytes;
  const Tiles tiles(total < kRows ? total : kRows);
  const int chunks = (job->pixel_bytes + kChunkBytes - 1) / kChunkBytes;
  // As in kernels.inl.h: a piece's last columns are kept for the sums of the next one.
  int kept = 0, out = 0;
  const uint8_t* rows[32];  // the partial sums of a column are those of 32 outputs, so the kernel is smaller
  for (int done = 0, n; done < total; done += n) {
    n = piece(total - done);
    for (int i = 0; i < k; ++i) rows[i] = job->rows[i] + static_cast<size_t>(done) * pixel;
    const Inputs in{rows, k, chunks, pixel, static_cast<const int8_t*>(job->weights)};
    for (int at = 0; at < n; at += 2 * kRows) {
      const Group g(at, n, 2);
      int32_t* acc = partial + static_cast<size_t>(kept + g.first[0]) * kBlock;
      if (job->is_signed)
        product<true, false>(in, g, kBlock, acc, [] {});
      else
        product<false, false>(in, g, kBlock, acc, [] {});
    }
    const int ready = kept + n - carry, start = ready > 0 ? ready : 0;
    column_values(partial, kBlock, ready, *job, job->values + static_cast<size_t>(out) * 4);
    out += start;
    kept += n - start;
    std::memmove(partial, partial + static_cast<size_t>(start) * kBlock, static_cast<size_t>(kept) * kPitch);
  }
}

size_t scratch_bytes(int32_t c_in_max) {
  const size_t split_rows = 2 * kMaxKernel * (static_cast<size_t>(kSegment + kMaxKernel) * c_in_max + kChunkBytes);
  const size_t own = 2 * kAccumulators * 4 + split_rows + 4096, other = cadyq_kernels_avx512vnni()->scratch_bytes(c_in_max);
  return own > other ? own : other;
}

}  // namespace
}  // namespace cadyq_avx512

// The kernel hands out the tiles' state to processes that ask for it; threads inherit the permission.
extern "C" int cadyq_amx_allowed(void) {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

extern "C" const CadyqKernels* cadyq_kernels_amx(void) {
  static const CadyqKernels k = [] {
    CadyqKernels own = *cadyq_kernels_avx512vnni();
    own.name = "amx";
    own.has_winograd = 0;  // its products are of 16 bits
    own.round_rows = 1;
    own.round_columns = cadyq_avx512::kRows;
    own.least_tile = 56;
    own.most_tile = 96;
    own.code_block = cadyq_avx512::kBlock;
    own.run_block = cadyq_avx512::kChunkBytes;
    own.code_offset = CADYQ_OFFSET_NONE;
    own.snaps_residual = 1;
    own.splits_values = CADYQ_SPLIT_PLANES;
    own.scratch_bytes = cadyq_avx512::scratch_bytes;
    own.direct = cadyq_avx512::direct;
    own.columns = cadyq_avx512::columns;
    return own;
  }();
  return &k;
}
