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
                              int element, const void* weights, const int32_t* init, int32_t* out) {
  const uint8_t* w = static_cast<const uint8_t*>(weights);
  if (element == kCodeBytes)
    gemm_rows<kCodeBytes>(rows, offset, n_rows, steps, stride, w, init, out, 16);
  else
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
    return own;
  }();
  return &k;
}
