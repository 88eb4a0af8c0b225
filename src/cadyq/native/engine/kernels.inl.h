// Kernels shared by the vector instruction sets; each source includes its simd_*.h, defines its matrix kernels,
// then includes this inside its own namespace. Needs: kLanes, kBlock (outputs per Winograd block), kTiles (Winograd
// tiles per round), gemm_winograd, and for direct kernels kDirectBlock, gemm_direct, kCodeBytes, kPixels.

constexpr int kInverse9 = 954437177;  // 9 * this = 1 modulo 2^32; equation (13)

#include "epilogue.inl.h"

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
CADYQ_INLINE size_t input_plane_bytes(int c_in) { return static_cast<size_t>(kTiles) * c_in * 2 + 64; }
constexpr size_t kProductPlane = static_cast<size_t>(kTiles) * kBlock * 4 + 64;

template <bool Unsigned>
CADYQ_INLINE void winograd_input(const CadyqWinograd& job, int ty, int tx, uint8_t* v, size_t plane) {
  const size_t column = static_cast<size_t>(tx) * 4 * job.c_in;
  for (int c = 0; c < job.c_in; c += 2 * kLanes) {
    I16 z[6][6];
    for (int q = 0; q < 6; ++q) {
      I16 d[6], o[6];
      for (int a = 0; a < 6; ++a)
        d[a] = load_codes<Unsigned>(job.rows[4 * ty + a] + column + static_cast<size_t>(q) * job.c_in + c);
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

CADYQ_INLINE void winograd_output(const CadyqWinograd& job, const EpilogueStore& store, int ty, int tx, int channel,
                                  const uint8_t* m) {
  I32 z[4][6];
  for (int q = 0; q < 6; ++q) {
    I32 d[6], o[4];
    for (int a = 0; a < 6; ++a) d[a] = load32(reinterpret_cast<const int32_t*>(m + (a * 6 + q) * kProductPlane));
    transform_output(d, o);
    for (int a = 0; a < 4; ++a) z[a][q] = o[a];
  }
  const int rows = job.height - 4 * ty, columns = job.width - 4 * tx;
  for (int a = 0; a < 4; ++a) {
    if (a >= rows) break;
    I32 y[4];
    transform_output(z[a], y);
    // What remains is 64 times the result: a power of two, so it moves into the scale exactly.
    for (int i = 0; i < 4; ++i) y[i] = mul32(y[i], kInverse9);
    if (columns >= 4)
      store(4 * ty + a, 4 * tx, channel, 4, y, 0.015625f);
    else
      store(4 * ty + a, 4 * tx, channel, columns, y, 0.015625f);
  }
}

template <bool Unsigned>
void winograd_region(const CadyqWinograd& job, uint8_t* scratch) {
  const size_t plane = input_plane_bytes(job.c_in);
  uint8_t *v = scratch, *m = scratch + ((36 * plane + 4095) & ~size_t{4095}) + 512;
  const int tw = (job.width + 3) / 4, n_tiles = (job.height + 3) / 4 * tw;
  const EpilogueStore store(job.epilogue, job.target);
  for (int first = 0; first < n_tiles; first += kTiles) {
    const int n = n_tiles - first < kTiles ? n_tiles - first : kTiles;
    for (int t = 0; t < n; ++t)
      winograd_input<Unsigned>(job, (first + t) / tw, (first + t) % tw, v + static_cast<size_t>(t) * job.c_in * 2, plane);
    const int16_t* u = job.weights;
    for (int block = 0; block < job.c_out; block += kBlock) {
      for (int p = 0; p < 36; ++p, u += static_cast<size_t>(job.c_in) * kBlock)
        for (int t = 0; t < n; t += kGemmTiles)
          gemm_winograd(v + p * plane + static_cast<size_t>(t) * job.c_in * 2, job.c_in, u,
                        reinterpret_cast<int32_t*>(m + p * kProductPlane) + static_cast<size_t>(t) * kBlock);
      for (int t = 0; t < n; ++t)
        for (int c = 0; c < kBlock && block + c < job.c_out; c += kLanes)
          winograd_output(job, store, (first + t) / tw, (first + t) % tw, block + c,
                          m + (static_cast<size_t>(t) * kBlock + c) * 4);
    }
  }
}

void winograd(const CadyqWinograd* job, void* scratch) {
  if (job->is_unsigned)
    winograd_region<true>(*job, static_cast<uint8_t*>(scratch));
  else
    winograd_region<false>(*job, static_cast<uint8_t*>(scratch));
}

// ---- direct, equation (5) ---------------------------------------------------------------------------------------

template <int Pixels, class Gemm>
CADYQ_INLINE void direct_block(const CadyqDirect& job, const EpilogueStore& store, int block, const Gemm& gemm,
                               int32_t* acc) {
  for (int y = 0; y < job.height; ++y)
    for (int x = 0; x < job.width; x += Pixels) {
      gemm(job.rows + y, static_cast<size_t>(x) * job.pixel_bytes);
      const int left = job.width - x;
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

void direct(const CadyqDirect* job, void* scratch) {
  int32_t* acc = static_cast<int32_t*>(scratch);
  const EpilogueStore store(job->epilogue, job->target);
  const int steps = (job->run_bytes + 3) / 4;
  const size_t block_bytes = static_cast<size_t>(job->kernel) * steps * kDirectBlock * 4;
  for (int block = 0; block < job->c_out; block += kDirectBlock) {
    const uint8_t* w = static_cast<const uint8_t*>(job->weights) + block / kDirectBlock * block_bytes;
    const int32_t* init = job->init + block;
    if (job->c_out - block <= kThinOutputs)
      direct_block<kThinPixels>(*job, store, block, [&](const uint8_t* const* rows, size_t offset) {
        gemm_thin(rows, offset, job->kernel, steps, job->pixel_bytes, job->element, w, init, acc);
      }, acc);
    else
      direct_block<kPixels>(*job, store, block, [&](const uint8_t* const* rows, size_t offset) {
        gemm_direct(rows, offset, job->kernel, steps, job->pixel_bytes, job->element, w, init, acc);
      }, acc);
  }
}

// ---- few outputs ------------------------------------------------------------------------------------------------

constexpr int kSegment = 120;  // pixels per round: a multiple of every kColumnPixels

void columns(const CadyqColumns* job, void* scratch) {
  int32_t* partial = static_cast<int32_t*>(scratch);  // [kSegment + kernel - 1][32]
  const int k = job->kernel, carry = k - 1, total = job->width + carry, steps = job->pixel_bytes / 4;
  // Column x + dx's partial sums for offset dx lie at [dx * c_out, ...); the first `carry` columns of a round are
  // the last of the round before.
  int done = 0, kept = 0, out = 0;
  while (out < job->width) {
    const int n = total - done < kSegment ? total - done : kSegment;
    for (int x = 0; x < n; x += kColumnPixels)
      gemm_columns(job->rows, static_cast<size_t>(done + x) * job->pixel_bytes, k, steps, job->pixel_bytes,
                   job->element, job->weights, job->init, partial + static_cast<size_t>(kept + x) * 32);
    const int ready = kept + n - carry;
    column_values(partial, 32, ready, *job, job->values + static_cast<size_t>(out) * 4);
    out += ready > 0 ? ready : 0;
    done += n;
    const int start = ready > 0 ? ready : 0;
    __builtin_memmove(partial, partial + static_cast<size_t>(start) * 32, static_cast<size_t>(kept + n - start) * 128);
    kept = kept + n - start;
  }
}

// ---- planes -----------------------------------------------------------------------------------------------------

void quantize(const int16_t* src, int32_t src_stride, void* dst, int32_t dst_stride, int32_t pixels, int32_t channels,
              const CadyqQuantizer* q, int32_t store, int32_t ahead) {
  const Clamp clamp(*q);
  const int step = 4 * kLanes;
  if (store == CADYQ_CODE8 && channels == 64) {
    // The common case, with the multipliers in registers.
    F32 m[64 / kLanes];
    for (int i = 0; i < 64 / kLanes; ++i) m[i] = load_f32(q->multiplier + i * kLanes);
    uint8_t* out = static_cast<uint8_t*>(dst);
    for (int x = 0; x < pixels; ++x) {
      const int16_t* next = src + static_cast<size_t>(x) * src_stride + ahead;
      prefetch(next);
      prefetch(next + 32);
      for (int c = 0; c < 64; c += step) {
        I32 v[4];
        for (int i = 0; i < 4; ++i)
          v[i] = rint32(mul(load16_f32(src + static_cast<size_t>(x) * src_stride + c + i * kLanes), m[c / kLanes + i]));
        store_run(out + static_cast<size_t>(x) * dst_stride + c, v, clamp);
      }
    }
    return;
  }
  for (int x = 0; x < pixels; ++x) {
    const int16_t* from = src + static_cast<size_t>(x) * src_stride;
    const size_t to = static_cast<size_t>(x) * dst_stride;
    int c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      I32 v[4];
      v[0] = v[1] = v[2] = v[3] = rint32(mul(load16_f32(from + c), load_f32(q->multiplier + c)));
      if (store == CADYQ_CODE8)
        store_codes(static_cast<uint8_t*>(dst) + to + c, 0, 1, v, clamp);
      else
        store_code16(static_cast<int16_t*>(dst) + to + c, v[0], clamp);
    }
    for (; c < channels; ++c) cadyq_quantize_one(from[c], dst, to + c, q->multiplier[c], *q, store);
  }
}

void snap(const int16_t* src, int32_t src_stride, int16_t* dst, int32_t dst_stride, int32_t pixels, int32_t channels,
          const CadyqSnap* s) {
  const F32 low = splat(static_cast<float>(s->low)), high = splat(static_cast<float>(s->high));
  for (int x = 0; x < pixels; ++x) {
    const int16_t* from = src + static_cast<size_t>(x) * src_stride;
    int16_t* to = dst + static_cast<size_t>(x) * dst_stride;
    int c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      F32 v = load16_f32(from + c);
      if (s->multiplier) v = round_clamped(mul(v, load_f32(s->multiplier + c)), low, high);
      store_int16(to + c, rint32(mul(v, load_f32(s->ratio + c))), nullptr, false);
    }
    for (; c < channels; ++c) to[c] = cadyq_snap_one(from[c], c, *s);
  }
}

template <bool Unsigned>
CADYQ_INLINE void expand_codes(const uint8_t* codes, int16_t* dst, int pixels, int channels, const float* ratio) {
  for (int x = 0; x < pixels; ++x, codes += channels, dst += channels)
    for (int c = 0; c < channels; c += kLanes)
      store_int16(dst + c, rint32(mul(load_code_f32<Unsigned>(codes + c), load_f32(ratio + c))), nullptr, false);
}

void expand(const uint8_t* codes, int32_t is_unsigned, int16_t* dst, int32_t pixels, int32_t channels, const float* ratio) {
  is_unsigned ? expand_codes<true>(codes, dst, pixels, channels, ratio) : expand_codes<false>(codes, dst, pixels, channels, ratio);
}

// Sums over at most 65536 pixels. Lanes have 32 bits: a sum of squares is known modulo 2^32 from one accumulator, and
// to less than 2^32 from another, which holds the upper halves of the squares.
template <int Vectors>
void region_sums(const int16_t* src, size_t pitch, int height, int width, int channels, int64_t* sum,
                 int64_t* squares) {
  constexpr int kWide = 2 * kLanes;
  I32 s[Vectors][2], low[Vectors][2], high[Vectors][2];
  for (int v = 0; v < Vectors; ++v)
    for (int half = 0; half < 2; ++half) s[v][half] = low[v][half] = high[v][half] = zero32();
  auto add_pair = [&](const int16_t* a, const int16_t* b) {
    for (int v = 0; v < Vectors; ++v) {
      const I16 x = load16(a + v * kWide), y = b ? load16(b + v * kWide) : zero32();
      for (int half = 0; half < 2; ++half) {
        const I16 pair = half ? interleave_high16(x, y) : interleave_low16(x, y);
        s[v][half] = add_dot16(s[v][half], pair, splat16(1));
        low[v][half] = add_dot16(low[v][half], pair, pair);
        high[v][half] = add_dot16(high[v][half], upper_product16(pair, pair), splat16(1));
      }
    }
  };
  for (int y = 0; y < height; ++y) {
    const int16_t* row = reinterpret_cast<const int16_t*>(reinterpret_cast<const uint8_t*>(src) + y * pitch);
    int x = 0;
    for (; x + 1 < width; x += 2, row += 2 * channels) add_pair(row, row + channels);
    if (x < width) add_pair(row, nullptr);
  }
  for (int v = 0; v < Vectors; ++v)
    for (int half = 0; half < 2; ++half) {
      alignas(64) int32_t sums[kLanes], lower[kLanes], upper[kLanes];
      store32(sums, s[v][half]);
      store32(lower, low[v][half]);
      store32(upper, high[v][half]);
      for (int i = 0; i < kLanes; ++i) {
        const int c = v * kWide + i / 4 * 8 + half * 4 + i % 4;  // as 128-bit lanes are interleaved
        const uint64_t least = static_cast<uint64_t>(upper[i]) << 16;
        sum[c] += sums[i];
        squares[c] += static_cast<int64_t>(least + static_cast<uint32_t>(static_cast<uint32_t>(lower[i]) - least));
      }
    }
}

void sums(const int16_t* src, size_t pitch, int32_t height, int32_t width, int32_t channels, int64_t* sum,
          int64_t* squares) {
  constexpr int kWide = 2 * kLanes;
  int c = 0;
  for (; c + 2 * kWide <= channels; c += 2 * kWide)
    region_sums<2>(src + c, pitch, height, width, channels, sum + c, squares + c);
  for (; c < channels; c += kWide) region_sums<1>(src + c, pitch, height, width, channels, sum + c, squares + c);
}

size_t scratch_bytes(int32_t c_in_max) {
  const size_t wino = 36 * input_plane_bytes(c_in_max) + 8192 + 36 * kProductPlane;
  const size_t few = (kSegment + 64) * 32 * 4;
  return (wino > few ? wino : few) + 4096;
}
