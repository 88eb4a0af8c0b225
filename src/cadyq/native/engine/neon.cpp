// Kernels for NEON with the dot product extension: 8-bit products by sdot. Every layer is a direct one: sdot makes 16
// products of 8 bits where smlal makes 4 of 16 bits, so Winograd's quarter of the products would take as many
// instructions, and its transforms on top. Values of 16 bits are two products, of their high and of their low bytes.
#include "simd_neon.h"

#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace cadyq_neon {
namespace {

constexpr int kBlock = 16, kVectors = kBlock / kLanes;  // outputs
constexpr int kPixels = 4, kColumnPixels = kPixels;
constexpr int kChunk = 16;  // inputs of one register

// What of the inputs is multiplied; codes are bytes, values are 16 bits.
enum Bytes { kCodes, kHigh, kLow };

// Sixteen inputs, as signed bytes: unsigned ones have an offset of -128, which is that of stored codes as well.
template <Bytes Which>
CADYQ_INLINE int8x16_t load_inputs(const uint8_t* x) {
  const int8_t* p = reinterpret_cast<const int8_t*>(x);
  if (Which == kCodes) return vld1q_s8(p);
  const int8x16_t a = vld1q_s8(p), b = vld1q_s8(p + kChunk);
  return Which == kHigh ? vuzp2q_s8(a, b) : veorq_s8(vuzp1q_s8(a, b), vdupq_n_s8(-128));
}

// One group of four inputs of four pixels times 16 outputs.
template <int Group>
CADYQ_INLINE void multiply(const int8x16_t in[kPixels], const int8_t* w, I32 acc[kPixels][kVectors]) {
  for (int j = 0; j < kVectors; ++j) {
    const int8x16_t weights = vld1q_s8(w + Group * kBlock * 4 + j * 16);
    for (int p = 0; p < kPixels; ++p) acc[p][j] = vdotq_laneq_s32(acc[p][j], weights, in[p], Group);
  }
}

// Four pixels, `stride` bytes apart, times 16 outputs over `n_rows` runs of inputs.
template <Bytes Which>
CADYQ_INLINE void accumulate(const uint8_t* const* rows, size_t offset, int n_rows, int chunks, size_t stride,
                             const int8_t* w, I32 acc[kPixels][kVectors]) {
  for (int r = 0; r < n_rows; ++r) {
    const uint8_t* x = rows[r] + offset;
    for (int i = 0; i < chunks; ++i, x += Which == kCodes ? kChunk : 2 * kChunk, w += kChunk * kBlock) {
      int8x16_t in[kPixels];
      for (int p = 0; p < kPixels; ++p) in[p] = load_inputs<Which>(x + p * stride);
      multiply<0>(in, w, acc);
      multiply<1>(in, w, acc);
      multiply<2>(in, w, acc);
      multiply<3>(in, w, acc);
    }
  }
}

CADYQ_INLINE void gemm_columns(const uint8_t* const* rows, size_t offset, int n_rows, int steps, size_t stride,
                               int /*element*/, const void* weights, const int32_t* init, int outputs, int32_t* out) {
  const int8_t* w = static_cast<const int8_t*>(weights);
  const int chunks = steps * 4 / kChunk;
  for (int block = 0; block < outputs; block += kBlock, w += static_cast<size_t>(n_rows) * chunks * kChunk * kBlock) {
    I32 acc[kPixels][kVectors];
    for (auto& pixel : acc)
      for (int j = 0; j < kVectors; ++j) pixel[j] = load32(init + block + j * kLanes);
    accumulate<kCodes>(rows, offset, n_rows, chunks, stride, w, acc);
    for (int p = 0; p < kPixels; ++p)
      for (int j = 0; j < kVectors; ++j) vst1q_s32(out + p * 32 + block + j * kLanes, acc[p][j]);
  }
}

// Results of a convolution with few outputs: sums along diagonals of its columns' partial sums, which are `pitch` apart.
CADYQ_INLINE void column_values(const int32_t* partial, int pitch, int n, const CadyqColumns& job, int16_t* values) {
  const F32 factor = vld1q_f32(job.factor), bias = vld1q_f32(job.bias);
  const F32 slope = job.slope ? vld1q_f32(job.slope) : vdupq_n_f32(1.f);
  for (int x = 0; x < n; ++x) {
    const int32_t* p = partial + static_cast<size_t>(x) * pitch;
    I32 sum = vld1q_s32(p);
    for (int dx = 1; dx < job.kernel; ++dx) sum = vaddq_s32(sum, vld1q_s32(p + dx * (pitch + job.c_out)));
    const F32 t = vaddq_f32(vmulq_f32(vcvtq_f32_s32(sum), factor), bias);
    const F32 activated = vbslq_f32(vcltzq_f32(t), vmulq_f32(t, slope), t);
    vst1_s16(values + static_cast<size_t>(x) * 4, vqmovn_s32(vcvtnq_s32_f32(activated)));
  }
}

#include "common.inl.h"

// Sixteen outputs of a region.
template <bool AreCodes>
void direct_block(const CadyqDirect& job, const EpilogueStore& store, int block, int chunks, const int8_t* w) {
  const int32_t* init = job.init + block;
  for (int y = 0; y < job.height; ++y)
    for (int x = 0; x < job.width; x += kPixels) {
      const size_t offset = static_cast<size_t>(x) * job.pixel_bytes;
      I32 acc[kPixels][kVectors];
      for (auto& pixel : acc)
        for (int j = 0; j < kVectors; ++j) pixel[j] = AreCodes ? load32(init + j * kLanes) : zero32();
      if (AreCodes) {
        accumulate<kCodes>(job.rows + y, offset, job.kernel, chunks, job.pixel_bytes, w, acc);
      } else {
        accumulate<kHigh>(job.rows + y, offset, job.kernel, chunks, job.pixel_bytes, w, acc);
        for (auto& pixel : acc)
          for (int j = 0; j < kVectors; ++j) pixel[j] = add32(vshlq_n_s32(pixel[j], 8), load32(init + j * kLanes));
        accumulate<kLow>(job.rows + y, offset, job.kernel, chunks, job.pixel_bytes, w, acc);
      }
      const int n = job.width - x < kPixels ? job.width - x : kPixels;
      for (int j = 0; j < kVectors; ++j) {
        const I32 v[kPixels] = {acc[0][j], acc[1][j], acc[2][j], acc[3][j]};
        store(y, x, block + j * kLanes, n, v, 1.0f);
      }
    }
}

void direct(const CadyqDirect* job, void*) {
  const EpilogueStore store(job->epilogue, job->target);
  const int chunks = (job->run_bytes / job->element + kChunk - 1) / kChunk;
  const int8_t* w = static_cast<const int8_t*>(job->weights);
  for (int block = 0; block < job->c_out; block += kBlock, w += static_cast<size_t>(job->kernel) * chunks * kChunk * kBlock)
    if (job->element == 1)
      direct_block<true>(*job, store, block, chunks, w);
    else
      direct_block<false>(*job, store, block, chunks, w);
}

size_t scratch_bytes(int32_t) { return kColumnsScratch; }

}  // namespace
}  // namespace cadyq_neon

extern "C" int cadyq_has_dotprod(void) {
#if defined(__APPLE__)
  return 1;  // all of Apple's 64-bit desktop processors have it
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return 0;
#endif
}

extern "C" const CadyqKernels* cadyq_kernels_neondotprod(void) {
  using namespace cadyq_neon;
  static const CadyqKernels k = [] {
    CadyqKernels own{"neondotprod", 0,        kBlock, 1,    kBlock,  1,      32,
                     scratch_bytes, quantize, snap,   sums, nullptr, direct, columns};
    own.run_block = kChunk;
    own.round_rows = 1;
    own.round_columns = kPixels;
    own.code_offset = CADYQ_OFFSET_UNSIGNED;
    own.splits_values = CADYQ_SPLIT_ALL;
    return own;
  }();
  return &k;
}
