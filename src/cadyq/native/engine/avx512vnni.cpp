// Kernels for AVX-512 with VNNI: 16-bit products by vpdpwssd, 8-bit products by vpdpbusd.
#include "simd_avx512.h"

#ifdef CADYQ_INTERLEAVED
#include "avx512_interleaved.h"
#endif

namespace cadyq_avx512 {
namespace {

constexpr int kTiles = 8, kGemmTiles = 4, kBlock = 64;
constexpr int kDirectBlock = 64, kPixels = 4, kColumnPixels = 8;

// The matrix kernels are assembly because GCC 12 spills accumulators that are left to it. Registers: 16 accumulators
// zmm16 to zmm31, weights zmm0 to zmm3, broadcast inputs zmm4 to zmm7.
#define CADYQ_ACCUMULATORS                                                                                        \
  "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20",     \
      "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28", "zmm29", "zmm30", "zmm31", "memory", \
      "cc"

#define CADYQ_DOT4(op, in, a, b, c, d)                                                   \
  op " %%zmm0," in "," a "\n\t" op " %%zmm1," in "," b "\n\t" op " %%zmm2," in "," c "\n\t" \
  op " %%zmm3," in "," d "\n\t"

// One group of inputs (4 bytes) of four pixels times 64 outputs.
#define CADYQ_STEP64(op, i)                                                              \
  "vmovdqu64 " #i "*256(%[w]),%%zmm0\n\tvmovdqu64 " #i "*256+64(%[w]),%%zmm1\n\t"          \
  "vmovdqu64 " #i "*256+128(%[w]),%%zmm2\n\tvmovdqu64 " #i "*256+192(%[w]),%%zmm3\n\t"     \
  "vpbroadcastd " #i "*4(%[x]),%%zmm4\n\t"                                               \
  CADYQ_DOT4(op, "%%zmm4", "%%zmm16", "%%zmm17", "%%zmm18", "%%zmm19")                   \
  "vpbroadcastd " #i "*4(%[x],%[s]),%%zmm5\n\t"                                          \
  CADYQ_DOT4(op, "%%zmm5", "%%zmm20", "%%zmm21", "%%zmm22", "%%zmm23")                   \
  "vpbroadcastd " #i "*4(%[x],%[s],2),%%zmm6\n\t"                                        \
  CADYQ_DOT4(op, "%%zmm6", "%%zmm24", "%%zmm25", "%%zmm26", "%%zmm27")                   \
  "vpbroadcastd " #i "*4(%[x],%[s3]),%%zmm7\n\t"                                         \
  CADYQ_DOT4(op, "%%zmm7", "%%zmm28", "%%zmm29", "%%zmm30", "%%zmm31")

#define CADYQ_COPY4(a, b, c, d) \
  "vmovdqa64 %%zmm0," a "\n\tvmovdqa64 %%zmm1," b "\n\tvmovdqa64 %%zmm2," c "\n\tvmovdqa64 %%zmm3," d "\n\t"
#define CADYQ_STORE(at, a) "vmovdqu64 " a "," at "(%[m])\n\t"
#define CADYQ_STORE4(at, a, b, c, d) \
  CADYQ_STORE(at, a) CADYQ_STORE(at "+64", b) CADYQ_STORE(at "+128", c) CADYQ_STORE(at "+192", d)

// Four pixels, `stride` bytes apart, times 64 outputs over n_rows runs of `steps` groups of 4 bytes.
#define CADYQ_GEMM64(name, op)                                                                                      \
  CADYQ_INLINE void name(const uint8_t* const* rows, size_t offset, long n_rows, long steps, size_t stride,         \
                         const void* weights, const int32_t* init, int32_t* out) {                                  \
    const uint8_t* x;                                                                                               \
    const void* w = weights;                                                                                        \
    long count;                                                                                                     \
    asm volatile(                                                                                                   \
        "vmovdqu64 (%[init]),%%zmm0\n\tvmovdqu64 64(%[init]),%%zmm1\n\t"                                            \
        "vmovdqu64 128(%[init]),%%zmm2\n\tvmovdqu64 192(%[init]),%%zmm3\n\t"                                        \
        CADYQ_COPY4("%%zmm16", "%%zmm17", "%%zmm18", "%%zmm19") CADYQ_COPY4("%%zmm20", "%%zmm21", "%%zmm22", "%%zmm23") \
        CADYQ_COPY4("%%zmm24", "%%zmm25", "%%zmm26", "%%zmm27") CADYQ_COPY4("%%zmm28", "%%zmm29", "%%zmm30", "%%zmm31") \
        "2:\n\tmovq (%[rows]),%[x]\n\taddq $8,%[rows]\n\taddq %[offset],%[x]\n\tmovq %[steps],%[count]\n\t"          \
        "shrq $1,%[count]\n\tjz 3f\n\t.p2align 5\n"                                                                 \
        "1:\n\t" CADYQ_STEP64(op, 0) CADYQ_STEP64(op, 1)                                                            \
        "addq $8,%[x]\n\taddq $512,%[w]\n\tdecq %[count]\n\tjnz 1b\n"                                               \
        "3:\n\ttestq $1,%[steps]\n\tjz 4f\n\t" CADYQ_STEP64(op, 0) "addq $256,%[w]\n"                               \
        "4:\n\tdecq %[n]\n\tjnz 2b\n\t"                                                                             \
        CADYQ_STORE4("0", "%%zmm16", "%%zmm17", "%%zmm18", "%%zmm19")                                               \
        CADYQ_STORE4("256", "%%zmm20", "%%zmm21", "%%zmm22", "%%zmm23")                                             \
        CADYQ_STORE4("512", "%%zmm24", "%%zmm25", "%%zmm26", "%%zmm27")                                             \
        CADYQ_STORE4("768", "%%zmm28", "%%zmm29", "%%zmm30", "%%zmm31")                                             \
        : [x] "=&r"(x), [w] "+r"(w), [rows] "+r"(rows), [n] "+r"(n_rows), [count] "=&r"(count)                      \
        : [s] "r"(stride), [s3] "r"(3 * stride), [m] "r"(out), [init] "r"(init), [steps] "r"(steps),                \
          [offset] "r"(offset)                                                                                      \
        : CADYQ_ACCUMULATORS);                                                                                      \
  }

CADYQ_GEMM64(gemm64_int16, "vpdpwssd")
CADYQ_GEMM64(gemm64_uint8, "vpdpbusd")

alignas(64) const int32_t kZeros[64] = {};

CADYQ_INLINE void gemm_winograd(const uint8_t* v, int c_in, const int16_t* u, int32_t* m) {
  gemm64_int16(&v, 0, 1, c_in / 2, static_cast<size_t>(c_in) * 2, u, kZeros, m);
}

CADYQ_INLINE void gemm_direct(const uint8_t* const* rows, size_t offset, int n_rows, int steps, size_t stride,
                              int element, const void* w, const int32_t* init, int32_t* out) {
  if (element == 1)
    gemm64_uint8(rows, offset, n_rows, steps, stride, w, init, out);
  else
    gemm64_int16(rows, offset, n_rows, steps, stride, w, init, out);
}

// One group of inputs of one pixel times 48 outputs.
#define CADYQ_STEP48(op, address, v, a, b, c)                                                               \
  "vpbroadcastd " address "," v "\n\t" op " %%zmm0," v "," a "\n\t" op " %%zmm1," v "," b "\n\t" op " %%zmm2," v \
  "," c "\n\t"
#define CADYQ_COPY3(a, b, c) "vmovdqa64 %%zmm0," a "\n\tvmovdqa64 %%zmm1," b "\n\tvmovdqa64 %%zmm2," c "\n\t"
#define CADYQ_STORE3(at, a, b, c) CADYQ_STORE(at, a) CADYQ_STORE(at "+64", b) CADYQ_STORE(at "+128", c)

// Eight pixels times the first 48 of 64 outputs, as above: three quarters of a block are common at the end of a network.
#define CADYQ_GEMM48(name, op)                                                                                      \
  CADYQ_INLINE void name(const uint8_t* const* rows, size_t offset, long n_rows, long steps, size_t stride,         \
                         const void* weights, const int32_t* init, int32_t* out) {                                  \
    const uint8_t *x, *y;                                                                                           \
    const void* w = weights;                                                                                        \
    long count;                                                                                                     \
    asm volatile(                                                                                                   \
        "vmovdqu64 (%[init]),%%zmm0\n\tvmovdqu64 64(%[init]),%%zmm1\n\tvmovdqu64 128(%[init]),%%zmm2\n\t"          \
        CADYQ_COPY3("%%zmm8", "%%zmm9", "%%zmm10") CADYQ_COPY3("%%zmm11", "%%zmm12", "%%zmm13")                     \
        CADYQ_COPY3("%%zmm14", "%%zmm15", "%%zmm16") CADYQ_COPY3("%%zmm17", "%%zmm18", "%%zmm19")                   \
        CADYQ_COPY3("%%zmm20", "%%zmm21", "%%zmm22") CADYQ_COPY3("%%zmm23", "%%zmm24", "%%zmm25")                   \
        CADYQ_COPY3("%%zmm26", "%%zmm27", "%%zmm28") CADYQ_COPY3("%%zmm29", "%%zmm30", "%%zmm31")                   \
        "2:\n\tmovq (%[rows]),%[x]\n\taddq $8,%[rows]\n\taddq %[offset],%[x]\n\tleaq (%[x],%[s],4),%[y]\n\t"         \
        "movq %[steps],%[count]\n\t.p2align 5\n"                                                                    \
        "1:\n\tvmovdqu64 (%[w]),%%zmm0\n\tvmovdqu64 64(%[w]),%%zmm1\n\tvmovdqu64 128(%[w]),%%zmm2\n\t"             \
        CADYQ_STEP48(op, "(%[x])", "%%zmm3", "%%zmm8", "%%zmm9", "%%zmm10")                                         \
        CADYQ_STEP48(op, "(%[x],%[s])", "%%zmm4", "%%zmm11", "%%zmm12", "%%zmm13")                                  \
        CADYQ_STEP48(op, "(%[x],%[s],2)", "%%zmm5", "%%zmm14", "%%zmm15", "%%zmm16")                                \
        CADYQ_STEP48(op, "(%[x],%[s3])", "%%zmm6", "%%zmm17", "%%zmm18", "%%zmm19")                                 \
        CADYQ_STEP48(op, "(%[y])", "%%zmm3", "%%zmm20", "%%zmm21", "%%zmm22")                                       \
        CADYQ_STEP48(op, "(%[y],%[s])", "%%zmm4", "%%zmm23", "%%zmm24", "%%zmm25")                                  \
        CADYQ_STEP48(op, "(%[y],%[s],2)", "%%zmm5", "%%zmm26", "%%zmm27", "%%zmm28")                                \
        CADYQ_STEP48(op, "(%[y],%[s3])", "%%zmm6", "%%zmm29", "%%zmm30", "%%zmm31")                                 \
        "addq $4,%[x]\n\taddq $4,%[y]\n\taddq $256,%[w]\n\tdecq %[count]\n\tjnz 1b\n\tdecq %[n]\n\tjnz 2b\n\t"        \
        CADYQ_STORE3("0", "%%zmm8", "%%zmm9", "%%zmm10") CADYQ_STORE3("256", "%%zmm11", "%%zmm12", "%%zmm13")       \
        CADYQ_STORE3("512", "%%zmm14", "%%zmm15", "%%zmm16") CADYQ_STORE3("768", "%%zmm17", "%%zmm18", "%%zmm19")   \
        CADYQ_STORE3("1024", "%%zmm20", "%%zmm21", "%%zmm22") CADYQ_STORE3("1280", "%%zmm23", "%%zmm24", "%%zmm25") \
        CADYQ_STORE3("1536", "%%zmm26", "%%zmm27", "%%zmm28") CADYQ_STORE3("1792", "%%zmm29", "%%zmm30", "%%zmm31") \
        : [x] "=&r"(x), [y] "=&r"(y), [w] "+r"(w), [rows] "+r"(rows), [n] "+r"(n_rows), [count] "=&r"(count)        \
        : [s] "r"(stride), [s3] "r"(3 * stride), [m] "r"(out), [init] "r"(init), [steps] "r"(steps),                \
          [offset] "r"(offset)                                                                                      \
        : CADYQ_ACCUMULATORS, "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15");                \
  }

CADYQ_GEMM48(gemm48_int16, "vpdpwssd")
CADYQ_GEMM48(gemm48_uint8, "vpdpbusd")

constexpr int kThinPixels = 8, kThinOutputs = 48;

CADYQ_INLINE void gemm_thin(const uint8_t* const* rows, size_t offset, int n_rows, int steps, size_t stride,
                            int element, const void* w, const int32_t* init, int32_t* out) {
  if (element == 1)
    gemm48_uint8(rows, offset, n_rows, steps, stride, w, init, out);
  else
    gemm48_int16(rows, offset, n_rows, steps, stride, w, init, out);
}

// One group of inputs of one pixel times 32 outputs.
#define CADYQ_STEP32(op, address, a, b)                                    \
  "vpbroadcastd " address ",%%zmm4\n\t" op " %%zmm0,%%zmm4," a "\n\t" op " %%zmm1,%%zmm4," b "\n\t"

// Eight pixels times 32 outputs, as above.
#define CADYQ_GEMM32(name, op)                                                                                      \
  CADYQ_INLINE void name(const uint8_t* const* rows, size_t offset, long n_rows, long steps, size_t stride,         \
                         const void* weights, const int32_t* init, int32_t* out) {                                  \
    const uint8_t *x, *y;                                                                                           \
    const void* w = weights;                                                                                        \
    long count;                                                                                                     \
    asm volatile(                                                                                                   \
        "vmovdqu64 (%[init]),%%zmm16\n\tvmovdqu64 64(%[init]),%%zmm17\n\t"                                          \
        "vmovdqa64 %%zmm16,%%zmm18\n\tvmovdqa64 %%zmm17,%%zmm19\n\tvmovdqa64 %%zmm16,%%zmm20\n\t"                    \
        "vmovdqa64 %%zmm17,%%zmm21\n\tvmovdqa64 %%zmm16,%%zmm22\n\tvmovdqa64 %%zmm17,%%zmm23\n\t"                    \
        "vmovdqa64 %%zmm16,%%zmm24\n\tvmovdqa64 %%zmm17,%%zmm25\n\tvmovdqa64 %%zmm16,%%zmm26\n\t"                    \
        "vmovdqa64 %%zmm17,%%zmm27\n\tvmovdqa64 %%zmm16,%%zmm28\n\tvmovdqa64 %%zmm17,%%zmm29\n\t"                    \
        "vmovdqa64 %%zmm16,%%zmm30\n\tvmovdqa64 %%zmm17,%%zmm31\n"                                                  \
        "2:\n\tmovq (%[rows]),%[x]\n\taddq $8,%[rows]\n\taddq %[offset],%[x]\n\tleaq (%[x],%[s],4),%[y]\n\t"         \
        "movq %[steps],%[count]\n\t.p2align 5\n"                                                                    \
        "1:\n\tvmovdqu64 (%[w]),%%zmm0\n\tvmovdqu64 64(%[w]),%%zmm1\n\t"                                            \
        CADYQ_STEP32(op, "(%[x])", "%%zmm16", "%%zmm17") CADYQ_STEP32(op, "(%[x],%[s])", "%%zmm18", "%%zmm19")      \
        CADYQ_STEP32(op, "(%[x],%[s],2)", "%%zmm20", "%%zmm21") CADYQ_STEP32(op, "(%[x],%[s3])", "%%zmm22", "%%zmm23") \
        CADYQ_STEP32(op, "(%[y])", "%%zmm24", "%%zmm25") CADYQ_STEP32(op, "(%[y],%[s])", "%%zmm26", "%%zmm27")      \
        CADYQ_STEP32(op, "(%[y],%[s],2)", "%%zmm28", "%%zmm29") CADYQ_STEP32(op, "(%[y],%[s3])", "%%zmm30", "%%zmm31") \
        "addq $4,%[x]\n\taddq $4,%[y]\n\taddq $128,%[w]\n\tdecq %[count]\n\tjnz 1b\n\tdecq %[n]\n\tjnz 2b\n\t"        \
        CADYQ_STORE4("0", "%%zmm16", "%%zmm17", "%%zmm18", "%%zmm19")                                               \
        CADYQ_STORE4("256", "%%zmm20", "%%zmm21", "%%zmm22", "%%zmm23")                                             \
        CADYQ_STORE4("512", "%%zmm24", "%%zmm25", "%%zmm26", "%%zmm27")                                             \
        CADYQ_STORE4("768", "%%zmm28", "%%zmm29", "%%zmm30", "%%zmm31")                                             \
        : [x] "=&r"(x), [y] "=&r"(y), [w] "+r"(w), [rows] "+r"(rows), [n] "+r"(n_rows), [count] "=&r"(count)        \
        : [s] "r"(stride), [s3] "r"(3 * stride), [m] "r"(out), [init] "r"(init), [steps] "r"(steps),                \
          [offset] "r"(offset)                                                                                      \
        : CADYQ_ACCUMULATORS);                                                                                      \
  }

CADYQ_GEMM32(gemm32_int16, "vpdpwssd")
CADYQ_GEMM32(gemm32_uint8, "vpdpbusd")

CADYQ_INLINE void gemm_columns(const uint8_t* const* rows, size_t offset, int n_rows, int steps, size_t stride,
                               int element, const void* w, const int32_t* init, int /*outputs*/, int32_t* out) {
  if (element == 1)
    gemm32_uint8(rows, offset, n_rows, steps, stride, w, init, out);
  else
    gemm32_int16(rows, offset, n_rows, steps, stride, w, init, out);
}

#include "kernels.inl.h"
#ifdef CADYQ_INTERLEAVED
#include "avx512_interleaved.inl.h"
#endif

}  // namespace
}  // namespace cadyq_avx512

extern "C" const CadyqKernels* cadyq_kernels_avx512vnni(void) {
  using namespace cadyq_avx512;
#ifdef CADYQ_INTERLEAVED
  constexpr auto scratch = scratch_bytes_interleaved;
  constexpr auto wino = winograd_or_interleaved;
#else
  constexpr auto scratch = scratch_bytes;
  constexpr auto wino = winograd;
#endif
  static const CadyqKernels k = [] {
    CadyqKernels own{"avx512vnni", 1,        kBlock, kTiles, kDirectBlock, 1,      64,
                     scratch,      quantize, snap,   sums,   wino,         direct, columns};
    own.expand = expand;
    return own;
  }();
  return &k;
}
