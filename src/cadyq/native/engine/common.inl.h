// What every vector instruction set shares, beside its matrix kernels: results, convolutions with few outputs, planes.
// Included inside the set's own namespace, behind its simd_*.h. Needs: kLanes, gemm_columns, kColumnPixels,
// column_values.

#include "epilogue.inl.h"

// ---- few outputs ------------------------------------------------------------------------------------------------

constexpr int kSegment = 120;  // pixels per round: a multiple of every kColumnPixels
constexpr size_t kColumnsScratch = (kSegment + 64) * 32 * 4;

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
                   job->element, job->weights, job->init, k * job->c_out, partial + static_cast<size_t>(kept + x) * 32);
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
    for (; store == CADYQ_CODE8 && c + step <= channels; c += step) {
      I32 v[4];
      for (int i = 0; i < 4; ++i)
        v[i] = rint32(mul(load16_f32(from + c + i * kLanes), load_f32(q->multiplier + c + i * kLanes)));
      store_run(static_cast<uint8_t*>(dst) + to + c, v, clamp);
    }
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
      const I16 x = load16(a + v * kWide), y = b ? load16(b + v * kWide) : splat16(0);
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
