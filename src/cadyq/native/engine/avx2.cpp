// Kernels for AVX2: 16-bit products by vpmaddwd. With CADYQ_AVXVNNI (avxvnni.cpp) the same for AVX-VNNI, which adds
// products to their sum at once, and takes four products of bytes as well.
#include "simd_avx2.h"

namespace cadyq_avx2 {
namespace {

constexpr int kTiles = 24, kGemmTiles = 6, kBlock = 16;
constexpr int kDirectBlock = 16, kPixels = 6, kColumnPixels = 6;

// Two int16 or four 8-bit inputs of one pixel times 16 outputs. Written as one block because GCC otherwise hoists the
// broadcasts and spills the accumulators.
#ifdef CADYQ_AVXVNNI
constexpr int kCodeBytes = 1;
#define CADYQ_MULTIPLY(op, p, address)                                                          \
  {                                                                                             \
    __m256i v;                                                                                  \
    asm volatile("vpbroadcastd %3,%2\n\t%{vex%} " op " %4,%2,%0\n\t%{vex%} " op " %5,%2,%1"         \
                 : "+x"(acc[p][0]), "+x"(acc[p][1]), "=&x"(v)                                   \
                 : "m"(*reinterpret_cast<const int32_t*>(address)), "x"(w0), "x"(w1));          \
  }
#define CADYQ_STEP(p, address)                         \
  {                                                    \
    if constexpr (Bytes == 1)                          \
      CADYQ_MULTIPLY("vpdpbusd", p, address)           \
    else                                               \
      CADYQ_MULTIPLY("vpdpwssd", p, address)           \
  }
#else
constexpr int kCodeBytes = 2;
#define CADYQ_STEP(p, address)                                                                              \
  {                                                                                                         \
    static_assert(Bytes == 2);                                                                              \
    __m256i v, t;                                                                                           \
    asm volatile(                                                                                           \
        "vpbroadcastd %4,%2\n\tvpmaddwd %5,%2,%3\n\tvpaddd %3,%0,%0\n\tvpmaddwd %6,%2,%2\n\tvpaddd %2,%1,%1" \
        : "+x"(acc[p][0]), "+x"(acc[p][1]), "=&x"(v), "=&x"(t)                                              \
        : "m"(*reinterpret_cast<const int32_t*>(address)), "x"(w0), "x"(w1));                               \
  }
#endif

// Six pixels, `stride` bytes apart, times 16 outputs, over `steps` groups of inputs of so many bytes.
template <int Bytes>
CADYQ_INLINE const uint8_t* run(const uint8_t* x, size_t stride, int steps, const uint8_t* w, __m256i acc[6][2]) {
  for (int s = 0; s < steps; ++s, x += 4, w += 64) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
    const uint8_t* x3 = x + 3 * stride;
    CADYQ_STEP(0, x)
    CADYQ_STEP(1, x + stride)
    CADYQ_STEP(2, x + 2 * stride)
    CADYQ_STEP(3, x3)
    CADYQ_STEP(4, x3 + stride)
    CADYQ_STEP(5, x3 + 2 * stride)
  }
  return w;
}

CADYQ_INLINE void gemm_winograd(const uint8_t* v, int c_in, const int16_t* u, int32_t* m) {
  __m256i acc[6][2];
  for (auto& a : acc) a[0] = a[1] = _mm256_setzero_si256();
  run<2>(v, static_cast<size_t>(c_in) * 2, c_in / 2, reinterpret_cast<const uint8_t*>(u), acc);
  for (int p = 0; p < 6; ++p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(m + p * 16), acc[p][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(m + p * 16 + 8), acc[p][1]);
  }
}

// `pitch` is the number of outputs between pixels of `out`.
template <int Bytes>
CADYQ_INLINE void gemm_rows(const uint8_t* const* rows, size_t offset, int n_rows, int steps, size_t stride,
                            const uint8_t* w, const int32_t* init, int32_t* out, int pitch) {
  __m256i acc[6][2];
  for (auto& a : acc) {
    a[0] = load32(init);
    a[1] = load32(init + 8);
  }
  for (int r = 0; r < n_rows; ++r) w = run<Bytes>(rows[r] + offset, stride, steps, w, acc);
  for (int p = 0; p < 6; ++p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + p * pitch), acc[p][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + p * pitch + 8), acc[p][1]);
  }
}

CADYQ_INLINE void gemm_direct(const uint8_t* const* rows, size_t offset, int n_rows, int steps, size_t stride,
                              [[maybe_unused]] int element, const void* weights, const int32_t* init, int32_t* out) {
  const uint8_t* w = static_cast<const uint8_t*>(weights);
  if constexpr (kCodeBytes == 1)
    if (element == 1) return gemm_rows<1>(rows, offset, n_rows, steps, stride, w, init, out, 16);
  gemm_rows<2>(rows, offset, n_rows, steps, stride, w, init, out, 16);
}

constexpr int kThinPixels = kPixels, kThinOutputs = 0;  // blocks are small here: none of its own

CADYQ_INLINE void gemm_thin(const uint8_t* const*, size_t, int, int, size_t, int, const void*, const int32_t*, int32_t*) {}

CADYQ_INLINE void gemm_columns(const uint8_t* const* rows, size_t offset, int n_rows, int steps, size_t stride,
                               int /*element*/, const void* weights, const int32_t* init, int outputs, int32_t* out) {
  const uint8_t* w = static_cast<const uint8_t*>(weights);
  const size_t half = static_cast<size_t>(n_rows) * steps * 64;
  gemm_rows<kCodeBytes>(rows, offset, n_rows, steps, stride, w, init, out, 32);
  if (outputs > 16) gemm_rows<kCodeBytes>(rows, offset, n_rows, steps, stride, w + half, init + 16, out + 16, 32);
}

#include "kernels.inl.h"

#ifndef CADYQ_AVXVNNI  // whose products of bytes are as many a cycle as what follows saves

void winograd5(const CadyqWinograd* job, void* scratch) {
  winograd_region<kInt16, 4>(*job, static_cast<uint8_t*>(scratch));
}

// ---- four rows of a convolution with few outputs, equation (13a) -------------------------------------------------

constexpr int kSpan = 24;  // columns whose transformed inputs are kept at once
static_assert(kSegment % kSpan == 0);

CADYQ_INLINE size_t span_plane(int depth) { return static_cast<size_t>(kSpan) * depth * 2 + 64; }
constexpr size_t kSpanProducts = static_cast<size_t>(kSpan) * 32 * 4 + 64;  // bytes of one of six planes
constexpr size_t kPartialRow = (kSegment + 64) * 32;                       // sums of one row

size_t columns4_scratch(int c_in) {
  return 6 * span_plane(CADYQ_MAX_SPLIT_KERNEL / 3 * c_in) + 6 * kSpanProducts + 4 * kPartialRow * 4 + 4096;
}

void columns4(const CadyqColumns* job, void* scratch) {
  const int c_in = job->pixel_bytes / 2, parts = job->kernel / 3, depth = parts * c_in, outputs = job->kernel * job->c_out;
  const int carry = job->kernel - 1, total = job->width + carry;
  uint8_t* v = static_cast<uint8_t*>(scratch);
  const size_t plane = span_plane(depth);
  uint8_t* m = v + 6 * plane;
  int32_t* partial = reinterpret_cast<int32_t*>(m + 6 * kSpanProducts);  // [4][kSegment + carry][32]
  // Columns `from` on of the region to sums from `to` on.
  auto span = [&](int from, int n, int to) {
    for (int x = 0; x < n; ++x)
      for (int c = 0; c < c_in; c += 2 * kLanes) {
        const size_t at = static_cast<size_t>(from + x) * job->pixel_bytes + c * 2;
        for (int part = 0; part < parts; ++part) {
          I16 d[6], o[6];
          for (int i = 0; i < 6; ++i) d[i] = load16(reinterpret_cast<const int16_t*>(job->rows[3 * part + i] + at));
          transform_input(d, o);
          uint8_t* p = v + (static_cast<size_t>(x) * depth + part * c_in + c) * 2;
          for (int a = 0; a < 6; ++a) store16(reinterpret_cast<int16_t*>(p + a * plane), o[a]);
        }
      }
    for (int half = 0; half * 16 < outputs; ++half) {
      const uint8_t* u = reinterpret_cast<const uint8_t*>(job->weights4) + static_cast<size_t>(half) * 6 * depth * 32;
      for (int a = 0; a < 6; ++a, u += static_cast<size_t>(depth) * 32)
        for (int x = 0; x < n; x += kPixels) {
          __m256i acc[6][2];
          for (auto& p : acc) p[0] = p[1] = zero32();
          const size_t stride = static_cast<size_t>(depth) * 2;
          run<2>(v + a * plane + x * stride, stride, depth / 2, u, acc);
          int32_t* out = reinterpret_cast<int32_t*>(m + a * kSpanProducts) + x * 32 + half * 16;
          for (int p = 0; p < kPixels; ++p) {
            store32(out + p * 32, acc[p][0]);
            store32(out + p * 32 + 8, acc[p][1]);
          }
        }
    }
    for (int x = 0; x < n; ++x)
      for (int o = 0; o < outputs; o += kLanes) {
        I32 d[6], y[4];
        for (int a = 0; a < 6; ++a) d[a] = load32(reinterpret_cast<const int32_t*>(m + a * kSpanProducts) + x * 32 + o);
        transform_output(d, y);
        for (int r = 0; r < 4; ++r) store32(partial + r * kPartialRow + static_cast<size_t>(to + x) * 32 + o, y[r]);
      }
  };
  // As in `columns`: the first `carry` columns of a round are the last of the round before.
  int done = 0, kept = 0, out = 0;
  while (out < job->width) {
    const int n = total - done < kSegment ? total - done : kSegment;
    for (int x = 0; x < n; x += kSpan) span(done + x, n - x < kSpan ? n - x : kSpan, kept + x);
    const int ready = kept + n - carry, start = ready > 0 ? ready : 0;
    for (int r = 0; r < 4; ++r) {
      int32_t* row = partial + r * kPartialRow;
      column_values<true>(row, 32, ready, *job, job->values + r * job->pitch + static_cast<size_t>(out) * 4);
      __builtin_memmove(row, row + static_cast<size_t>(start) * 32, static_cast<size_t>(kept + n - start) * 128);
    }
    out += start;
    done += n;
    kept = kept + n - start;
  }
}

#endif

}  // namespace
}  // namespace cadyq_avx2

#ifdef CADYQ_AVXVNNI
#define CADYQ_NAME "avxvnni"
#define CADYQ_FUNCTION cadyq_kernels_avxvnni
#else
#define CADYQ_NAME "avx2"
#define CADYQ_FUNCTION cadyq_kernels_avx2
#endif

extern "C" const CadyqKernels* CADYQ_FUNCTION(void) {
  using namespace cadyq_avx2;
  static const CadyqKernels k = [] {
    CadyqKernels own{CADYQ_NAME,    1,        kBlock, kTiles, kDirectBlock, kCodeBytes, 32,
                     scratch_bytes, quantize, snap,   sums,   winograd,     direct,     columns};
    own.expand = expand;
#ifndef CADYQ_AVXVNNI
    own.scratch_bytes = [](int32_t c_in) {
      const size_t five = 36 * input_plane_bytes(kTiles / 2, 4 * c_in) + 8192 + 36 * kProductPlane, four = columns4_scratch(c_in);
      const size_t most = five > four ? five : four, other = scratch_bytes(c_in);
      return most > other ? most : other;
    };
    own.columns4 = columns4;
    own.winograd5 = winograd5;
#endif
    return own;
  }();
  return &k;
}
