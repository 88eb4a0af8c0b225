// Kernels shared by AVX2 and AVX-512; each source includes its simd_*.h, defines its matrix kernels, then includes
// this inside its own namespace. Needs: kLanes, kBlock (outputs per Winograd block), kTiles (Winograd tiles per round),
// gemm_winograd, for direct kernels kDirectBlock, gemm_direct, kCodeBytes, kPixels, and what common.inl.h needs.

constexpr int kInverse9 = 954437177;  // 9 * this = 1 modulo 2^32; equation (13)

#include "column_values.inl.h"
#include "common.inl.h"

// Where a block's results go from pixel (y, x) of the region on, and how far pixels lie apart.
struct Destination {
  uint8_t* to;
  const int16_t* residual;
  size_t stride;
};

CADYQ_INLINE Destination destination(const CadyqTarget& target, int element, int block, int y, int x) {
  const int s = target.shuffle, sub = block / target.channels, row = y * s + sub / s;
  const size_t at = (static_cast<size_t>(x) * s + sub % s) * target.channels + block % target.channels;
  return {target.rows[row] + at * element, target.residual ? target.residual[row] + at : nullptr,
          static_cast<size_t>(s) * target.channels};
}

// ---- Winograd F(4,3), equations (11) to (13) --------------------------------------------------------------------

CADYQ_INLINE void transform_input(const I16 d[6], I16 o[6]) {
  const I16 p = sub16(d[4], shl16<2>(d[2])), q = sub16(d[3], shl16<2>(d[1]));
  const I16 e = sub16(d[4], d[2]), f = shl16<1>(sub16(d[3], d[1]));
  o[0] = add16(shl16<2>(sub16(d[0], d[2])), e);
  o[1] = add16(p, q);
  o[2] = sub16(p, q);
  o[3] = add16(e, f);
  o[4] = sub16(e, f);
  o[5] = sub16(sub16(d[5], d[3]), shl16<1>(f));
}

CADYQ_INLINE void transform_output(const I32 m[6], I32 y[4]) {
  const I32 a = add32(m[1], m[2]), b = sub32(m[1], m[2]), c = add32(m[3], m[4]), d = shl32<1>(sub32(m[3], m[4]));
  y[0] = add32(m[0], add32(a, c));
  y[1] = add32(b, d);
  y[2] = add32(a, shl32<2>(c));
  y[3] = add32(b, shl32<2>(add32(d, m[5])));
}

// Planes of transformed values are 64 bytes further apart than their size, so that they do not share cache sets.
CADYQ_INLINE size_t input_plane_bytes(int tiles, int c_in) { return static_cast<size_t>(tiles) * c_in * 2 + 64; }
constexpr size_t kProductPlane = static_cast<size_t>(kTiles) * kBlock * 4 + 64;

// What Winograd layers read: 8-bit codes without or with a sign, or int16 ones.
constexpr int kSigned = 0, kUnsigned = 1, kInt16 = 2;

// 6x6 inputs from (y, x) of the rows on, to the same place of 36 planes.
template <int Codes>
CADYQ_INLINE void winograd_input(const CadyqWinograd& job, int y, int x, uint8_t* v, size_t plane) {
  for (int c = 0; c < job.c_in; c += 2 * kLanes) {
    I16 z[6][6];
    for (int q = 0; q < 6; ++q) {
      const size_t at = static_cast<size_t>(x + q) * job.c_in + c;
      I16 d[6], o[6];
      for (int a = 0; a < 6; ++a) {
        const uint8_t* row = job.rows[y + a];
        if constexpr (Codes == kInt16)
          d[a] = load16(reinterpret_cast<const int16_t*>(row) + at);
        else
          d[a] = load_codes<Codes == kUnsigned>(row + at);
      }
      transform_input(d, o);
      for (int a = 0; a < 6; ++a) z[a][q] = o[a];
    }
    for (int a = 0; a < 6; ++a) {
      I16 o[6];
      transform_input(z[a], o);
      for (int q = 0; q < 6; ++q) store16(reinterpret_cast<int16_t*>(v + (a * 6 + q) * plane) + c, o[q]);
    }
  }
}

// Along the columns: 36 products become 24 values, [row][column].
CADYQ_INLINE void winograd_columns(const uint8_t* m, I32 z[4][6]) {
  for (int q = 0; q < 6; ++q) {
    I32 d[6], o[4];
    for (int a = 0; a < 6; ++a) d[a] = load32(reinterpret_cast<const int32_t*>(m + (a * 6 + q) * kProductPlane));
    transform_output(d, o);
    for (int a = 0; a < 4; ++a) z[a][q] = o[a];
  }
}

// Along a row. What remains is 64 times the result: a power of two, so it moves into the scale exactly.
CADYQ_INLINE void winograd_row(const I32 z[6], I32 y[4]) {
  transform_output(z, y);
  for (int i = 0; i < 4; ++i) y[i] = mul32(y[i], kInverse9);
}
constexpr float kRemaining = 0.015625f;

CADYQ_INLINE void winograd_output(const CadyqWinograd& job, const EpilogueStore& store, int ty, int tx, int channel,
                                  const uint8_t* m) {
  I32 z[4][6], y[4];
  winograd_columns(m, z);
  const int rows = job.height - 4 * ty, columns = job.width - 4 * tx;
  for (int a = 0; a < 4 && a < rows; ++a) {
    winograd_row(z[a], y);
    store(4 * ty + a, 4 * tx, channel, columns < 4 ? columns : 4, y, kRemaining);
  }
}

// What is added to int16 results.
constexpr int kNothing = 0, kResidual = 1, kRectified = 2;

// A whole tile of kBlock channels, for what is common: slopes that are fractions, no codes before the sum. Everything is
// read before anything is written: stores could change it for all that the compiler knows. `Clamped`: codes do not cover
// what reaches them. `Sum`: of int16 results.
template <int Store, bool Slope, bool Clamped, int Sum>
void winograd_whole(const CadyqWinograd& job, const EpilogueStore& store, int ty, int tx, int block, const uint8_t* m) {
  const CadyqEpilogue& e = job.epilogue;
  Destination to[4];
  constexpr bool kCodes = Store != CADYQ_INT16;
  for (int a = 0; a < 4; ++a) to[a] = destination(job.target, Store == CADYQ_CODE8 ? 1 : 2, block, 4 * ty + a, 4 * tx);
  const size_t stride = to[0].stride;
  const Clamp clamp = store.clamp;
  for (int c = 0; c < kBlock; c += kLanes) {
    const F32 factor = mul(load_f32(e.factor + block + c), splat(kRemaining)), bias = load_f32(e.bias + block + c);
    F32 slope, requant;
    if constexpr (Slope) slope = load_f32(e.slope + block + c);
    if constexpr (kCodes) requant = load_f32(e.quantizer.multiplier + block + c);
    I32 z[4][6];
    winograd_columns(m + c * 4, z);
    for (int a = 0; a < 4; ++a) {
      I32 y[4];
      winograd_row(z[a], y);
      for (int i = 0; i < 4; ++i) {
        F32 t = add(mul(to_f32(y[i]), factor), bias);
        if constexpr (Slope) t = larger(t, mul(t, slope));
        if constexpr (kCodes) t = mul(Clamped ? round_clamped(t, splat(-32768.f), splat(32767.f)) : rounded(t), requant);
        y[i] = rint32(t);
      }
      if constexpr (Store == CADYQ_CODE8) {
        store_codes(to[a].to + c, stride, 4, y, clamp);
      } else {
        int16_t* p = reinterpret_cast<int16_t*>(to[a].to) + c;
        for (int i = 0; i < 4; ++i)
          if constexpr (Store == CADYQ_CODE16)
            store_code16(p + i * stride, y[i], clamp);
          else
            store_int16(p + i * stride, y[i], Sum == kNothing ? nullptr : to[a].residual + c + i * stride, Sum == kRectified);
      }
    }
  }
}

using WinogradWhole = void (*)(const CadyqWinograd&, const EpilogueStore&, int, int, int, const uint8_t*);

// Whether results are of the common kind: no codes before the sum, slopes that are fractions, whole blocks.
inline bool is_common(const CadyqEpilogue& e, const CadyqTarget& target, int c_out, int block) {
  return c_out % block == 0 && target.channels % block == 0 && !e.gain && e.slopes != CADYQ_ANY;
}

// Unsigned codes know nothing negative, so they do without a slope of zero.
inline bool has_slope(const CadyqEpilogue& e) {
  return e.slope && !(e.store != CADYQ_INT16 && e.quantizer.is_unsigned && e.slopes == CADYQ_ZEROS);
}

template <int Store, bool Clamped, int Sum>
WinogradWhole winograd_whole_with(bool slope) {
  return slope ? winograd_whole<Store, true, Clamped, Sum> : winograd_whole<Store, false, Clamped, Sum>;
}

// Which of them finishes a job's whole tiles; null: none does.
inline WinogradWhole winograd_whole_for(const CadyqWinograd& job) {
  const CadyqEpilogue& e = job.epilogue;
  if (!is_common(e, job.target, job.c_out, kBlock)) return nullptr;
  const bool slope = has_slope(e), covers = e.quantizer.covers;
  if (e.store == CADYQ_CODE8)
    return covers ? winograd_whole_with<CADYQ_CODE8, false, kNothing>(slope) : winograd_whole_with<CADYQ_CODE8, true, kNothing>(slope);
  if (e.store == CADYQ_CODE16)
    return covers ? winograd_whole_with<CADYQ_CODE16, false, kNothing>(slope) : winograd_whole_with<CADYQ_CODE16, true, kNothing>(slope);
  if (!job.target.residual) return e.rectify ? nullptr : winograd_whole_with<CADYQ_INT16, false, kNothing>(slope);
  return e.rectify ? winograd_whole_with<CADYQ_INT16, false, kRectified>(slope)
                   : winograd_whole_with<CADYQ_INT16, false, kResidual>(slope);
}

// A layer of 3x3, or with four Parts one of 5x5, equation (13b). More parts take as much more room, so fewer tiles.
template <int Codes, int Parts = 1>
void winograd_region(const CadyqWinograd& job, uint8_t* scratch) {
  constexpr int tiles = Parts == 1 ? kTiles : kTiles / 2;
  const int depth = Parts * job.c_in, tw = (job.width + 3) / 4, n_tiles = (job.height + 3) / 4 * tw;
  const size_t plane = input_plane_bytes(tiles, depth);
  uint8_t *v = scratch, *m = scratch + ((36 * plane + 4095) & ~size_t{4095}) + 512;
  const EpilogueStore store(job.epilogue, job.target);
  const WinogradWhole whole = winograd_whole_for(job);
  for (int first = 0; first < n_tiles; first += tiles) {
    const int n = n_tiles - first < tiles ? n_tiles - first : tiles;
    for (int t = 0; t < n; ++t)
      for (int part = 0; part < Parts; ++part)
        winograd_input<Codes>(job, (first + t) / tw * 4 + part / 2 * 3, (first + t) % tw * 4 + part % 2 * 3,
                              v + (static_cast<size_t>(t) * depth + part * job.c_in) * 2, plane);
    const int16_t* u = job.weights;
    for (int block = 0; block < job.c_out; block += kBlock) {
      for (int p = 0; p < 36; ++p, u += static_cast<size_t>(depth) * kBlock)
        for (int t = 0; t < n; t += kGemmTiles)
          gemm_winograd(v + p * plane + static_cast<size_t>(t) * depth * 2, depth, u,
                        reinterpret_cast<int32_t*>(m + p * kProductPlane) + static_cast<size_t>(t) * kBlock);
      for (int t = 0; t < n; ++t) {
        const int ty = (first + t) / tw, tx = (first + t) % tw;
        const uint8_t* products = m + static_cast<size_t>(t) * kBlock * 4;
        if (whole && 4 * ty + 4 <= job.height && 4 * tx + 4 <= job.width) {
          whole(job, store, ty, tx, block, products);
          continue;
        }
        for (int c = 0; c < kBlock && block + c < job.c_out; c += kLanes)
          winograd_output(job, store, ty, tx, block + c, products + c * 4);
      }
    }
  }
}

void winograd(const CadyqWinograd* job, void* scratch) {
  if (job->is_unsigned)
    winograd_region<kUnsigned>(*job, static_cast<uint8_t*>(scratch));
  else
    winograd_region<kSigned>(*job, static_cast<uint8_t*>(scratch));
}

// ---- direct, equation (5) ---------------------------------------------------------------------------------------

// kPixels pixels of kDirectBlock channels, for what is common: slopes are fractions, codes cover what reaches them.
template <int Store, bool Slope, bool Residual>
void direct_whole(const CadyqEpilogue& e, const Clamp& of, int block, const int32_t* acc, const Destination& d) {
  constexpr int kVectors = kDirectBlock / kLanes, kTogether = kVectors < 4 ? 4 / kVectors : 1;
  static_assert(kPixels % kTogether == 0 && (kVectors == 2 || kVectors == 4));
  const Clamp clamp = of;
  F32 factor[kVectors], bias[kVectors], slope[kVectors], requant[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    const int c = block + i * kLanes;
    factor[i] = load_f32(e.factor + c);
    bias[i] = load_f32(e.bias + c);
    if constexpr (Slope) slope[i] = load_f32(e.slope + c);
    if constexpr (Store != CADYQ_INT16) requant[i] = load_f32(e.quantizer.multiplier + c);
  }
  uint8_t* to = d.to;
  const int16_t* residual = d.residual;
  for (int p = 0; p < kPixels; p += kTogether) {
    I32 v[4];
    for (int i = 0; i < 4; ++i, acc += kLanes) {
      const int j = i % kVectors;
      F32 t = add(mul(to_f32(load32(acc)), factor[j]), bias[j]);
      if constexpr (Slope) t = larger(t, mul(t, slope[j]));
      v[i] = rint32(Store == CADYQ_INT16 ? t : mul(rounded(t), requant[j]));
    }
    constexpr int element = Store == CADYQ_CODE8 ? 1 : 2;
    if constexpr (Store == CADYQ_CODE8) {
      store_pixels<kTogether>(to, d.stride, v, clamp);
    } else {
      for (int i = 0; i < 4; ++i) {
        const size_t at = i / kVectors * d.stride + i % kVectors * kLanes;
        int16_t* p16 = reinterpret_cast<int16_t*>(to) + at;
        if constexpr (Store == CADYQ_CODE16)
          store_code16(p16, v[i], clamp);
        else
          store_int16(p16, v[i], Residual ? residual + at : nullptr, false);
      }
    }
    to += kTogether * d.stride * element;
    if constexpr (Residual) residual += kTogether * d.stride;
  }
}

using DirectWhole = void (*)(const CadyqEpilogue&, const Clamp&, int, const int32_t*, const Destination&);

template <int Store, bool Residual>
DirectWhole direct_whole_with(bool slope) {
  return slope ? direct_whole<Store, true, Residual> : direct_whole<Store, false, Residual>;
}

// Which of them finishes a job's pixels; null: none does.
inline DirectWhole direct_whole_for(const CadyqDirect& job) {
  const CadyqEpilogue& e = job.epilogue;
  if (!is_common(e, job.target, job.c_out, kDirectBlock) || e.rectify) return nullptr;
  if (e.store != CADYQ_INT16 && !e.quantizer.covers) return nullptr;
  const bool slope = has_slope(e);
  if (e.store == CADYQ_CODE8) return direct_whole_with<CADYQ_CODE8, false>(slope);
  if (e.store == CADYQ_CODE16) return direct_whole_with<CADYQ_CODE16, false>(slope);
  return job.target.residual ? direct_whole_with<CADYQ_INT16, true>(slope) : direct_whole_with<CADYQ_INT16, false>(slope);
}

template <int Pixels, class Gemm>
CADYQ_INLINE void direct_block(const CadyqDirect& job, const EpilogueStore& store, int block, DirectWhole whole,
                               const Gemm& gemm, int32_t* acc) {
  for (int y = 0; y < job.height; ++y) {
    Destination to = destination(job.target, store.element, block, y, 0);
    for (int x = 0; x < job.width; x += Pixels) {
      gemm(job.rows + y, static_cast<size_t>(x) * job.pixel_bytes);
      const int left = job.width - x;
      if (whole && left >= Pixels) {
        whole(job.epilogue, store.clamp, block, acc, to);
        to.to += Pixels * to.stride * store.element;
        if (to.residual) to.residual += Pixels * to.stride;
        continue;
      }
      for (int p = 0; p < Pixels && p < left; p += 4)
        for (int c = 0; c < kDirectBlock && block + c < job.c_out; c += kLanes) {
          I32 v[4];
          for (int i = 0; i < 4; ++i) {
            const int pixel = p + i < Pixels ? p + i : Pixels - 1;
            v[i] = load32(acc + pixel * kDirectBlock + c);
          }
          const int valid = left - p < Pixels - p ? left - p : Pixels - p;
          store(y, x + p, block + c, valid < 4 ? valid : 4, v, 1.0f);
        }
    }
  }
}

void direct(const CadyqDirect* job, void* scratch) {
  int32_t* acc = static_cast<int32_t*>(scratch);
  const EpilogueStore store(job->epilogue, job->target);
  const DirectWhole whole = direct_whole_for(*job);
  const int steps = (job->run_bytes + 3) / 4;
  const size_t block_bytes = static_cast<size_t>(job->kernel) * steps * kDirectBlock * 4;
  for (int block = 0; block < job->c_out; block += kDirectBlock) {
    const uint8_t* w = static_cast<const uint8_t*>(job->weights) + block / kDirectBlock * block_bytes;
    const int32_t* init = job->init + block;
    if (job->c_out - block <= kThinOutputs)
      direct_block<kThinPixels>(*job, store, block, nullptr, [&](const uint8_t* const* rows, size_t offset) {
        gemm_thin(rows, offset, job->kernel, steps, job->pixel_bytes, job->element, w, init, acc);
      }, acc);
    else
      direct_block<kPixels>(*job, store, block, whole, [&](const uint8_t* const* rows, size_t offset) {
        gemm_direct(rows, offset, job->kernel, steps, job->pixel_bytes, job->element, w, init, acc);
      }, acc);
  }
}

// ---- codes of Winograd layers as values -------------------------------------------------------------------------

template <bool Unsigned>
CADYQ_INLINE void expand_codes(const uint8_t* codes, int16_t* dst, int pixels, int channels, const float* ratio) {
  for (int x = 0; x < pixels; ++x, codes += channels, dst += channels)
    for (int c = 0; c < channels; c += kLanes)
      store_int16(dst + c, rint32(mul(load_code_f32<Unsigned>(codes + c), load_f32(ratio + c))), nullptr, false);
}

void expand(const uint8_t* codes, int32_t is_unsigned, int16_t* dst, int32_t pixels, int32_t channels, const float* ratio) {
  is_unsigned ? expand_codes<true>(codes, dst, pixels, channels, ratio) : expand_codes<false>(codes, dst, pixels, channels, ratio);
}

size_t scratch_bytes(int32_t c_in_max) {
  const size_t wino = 36 * input_plane_bytes(kTiles, c_in_max) + 8192 + 36 * kProductPlane;
  return (wino > kColumnsScratch ? wino : kColumnsScratch) + 4096;
}
