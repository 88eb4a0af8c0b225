// What a kernel set (one per instruction set) offers to the engine: plain structs and function pointers.
// Equation numbers refer to docs/numerics.md.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

// How results are stored: int16 values, or codes of the only site that reads them.
enum CadyqStore { CADYQ_INT16 = 0, CADYQ_CODE8 = 1, CADYQ_CODE16 = 2 };

// What is known of all slopes of an activation; none at all are fractions, too.
enum CadyqSlopes { CADYQ_ANY = 0, CADYQ_FRACTIONS = 1, CADYQ_ZEROS = 2 };

// Which 8-bit codes direct kernels want stored with an offset of 128, as their products take unsigned or signed ones
// only. With CADYQ_OFFSET_UNSIGNED, the low bytes of split values are treated alike, by the kernels themselves.
enum CadyqOffset { CADYQ_OFFSET_SIGNED = 0, CADYQ_OFFSET_NONE = 1, CADYQ_OFFSET_UNSIGNED = 2 };

// Which int16 values are multiplied by 8-bit weights: none; those of planes, by kernels up to CADYQ_MAX_SPLIT_KERNEL;
// all, the picture's as well.
enum CadyqSplit { CADYQ_SPLIT_NONE = 0, CADYQ_SPLIT_PLANES = 1, CADYQ_SPLIT_ALL = 2 };

// Equation (4): code = clamp(rint(value * multiplier), low, high). `flip` is 0x80 where 8-bit codes are stored
// with an offset of 128 (CadyqOffset).
struct CadyqQuantizer {
  const float* multiplier;  // one per channel
  int32_t low, high;
  int32_t is_unsigned;
  uint8_t flip;
  // No value that reaches it leaves the range of codes but for being clamped to it: clamping to int16 before is idle.
  uint8_t covers;
};

// Values, or with a multiplier their codes, on another grid: clamp16(rint(x * ratio)); equation (14).
struct CadyqSnap {
  const float *multiplier, *ratio;  // multiplier may be null
  int32_t low, high;
};

// Equation (7), then a residual or a quantiser. Arrays have one entry per (padded) output channel.
struct CadyqEpilogue {
  const float *factor, *bias;
  const float* slope;  // null: no activation
  int32_t slopes;      // CadyqSlopes; where they lie in [0, 1], activation is the larger of t and slope * t
  int32_t store;       // CadyqStore
  CadyqQuantizer quantizer;
  // Only with CADYQ_INT16: results are codes up to `levels` first and `gain` times that then; null: no codes.
  const float* gain;
  float levels;
  int32_t rectify;  // only with CADYQ_INT16: negative values become 0 after the residual
};

// Output rows; with PixelShuffle r, rows[y * r + dy]. Each address is that of the region's first pixel.
struct CadyqTarget {
  uint8_t* const* rows;
  const int16_t* const* residual;  // null: none; only with CADYQ_INT16
  int32_t shuffle;
  int32_t channels;  // of the target plane, padded
  const CadyqSnap* snap;  // null: residual values are added as they are; only where kernels have `snaps_residual`
};

// 3x3 convolution of a region by Winograd F(4,3). rows[i] is pixel (x0 - 1) of row (y0 - 1 + i); there are
// 4 * ceil(height / 4) + 2 rows, each readable for 4 * ceil(width / 4) + 2 pixels.
struct CadyqWinograd {
  const uint8_t* const* rows;
  int32_t height, width, c_in, c_out, is_unsigned;
  const int16_t* weights;
  CadyqEpilogue epilogue;
  CadyqTarget target;
};

// Direct k x k convolution of a region. rows[i] is pixel (x0 - k / 2) of row (y0 - k / 2 + i). Each row of the
// kernel is one run of `run_bytes` bytes; `element` is 1 (codes) or 2 (int16), `weight_bytes` likewise.
struct CadyqDirect {
  const uint8_t* const* rows;
  int32_t height, width, kernel, pixel_bytes, run_bytes, element, weight_bytes, is_signed, c_out;
  const void* weights;
  const int32_t* init;
  CadyqEpilogue epilogue;
  CadyqTarget target;
};

// k x k convolution with few outputs, one row: a k x 1 convolution with k * c_out outputs, then a sum along the
// row. Results, equation (7) clamped to int16, go to values[x * 4 + o].
struct CadyqColumns {
  const uint8_t* const* rows;  // `kernel` rows, from pixel -(k / 2)
  int32_t width, kernel, pixel_bytes, element, is_signed, c_out;
  const void* weights;
  const int32_t* init;  // of the partial sums
  const float *factor, *bias, *slope;  // four each; slope may be null
  int16_t* values;
  // Of four rows at once (CadyqKernels::columns4): `kernel` + 3 rows are given, and results of a row lie `pitch` values
  // behind those of the one above.
  const int16_t* weights4;
  size_t pitch;
};

constexpr int CADYQ_MAX_SPLIT_KERNEL = 17;

struct CadyqKernels {
  const char* name;
  int32_t has_winograd;
  int32_t winograd_block;  // outputs per block of packed Winograd weights
  int32_t winograd_tiles;  // 4x4 outputs per round: regions should hold a multiple of it
  int32_t direct_block;    // the same for direct kernels
  int32_t code_bytes;      // of the codes that the direct kernels read
  int32_t channel_block;   // planes of more than 32 channels are padded to multiples of this
  size_t (*scratch_bytes)(int32_t c_in_max);
  // Strides are the channels from one pixel to the next. `ahead` is where what is read next lies, 0: unknown.
  void (*quantize)(const int16_t* src, int32_t src_stride, void* dst, int32_t dst_stride, int32_t pixels,
                   int32_t channels, const CadyqQuantizer* q, int32_t store, int32_t ahead);
  void (*snap)(const int16_t* src, int32_t src_stride, int16_t* dst, int32_t dst_stride, int32_t pixels,
               int32_t channels, const CadyqSnap* s);
  // Adds a region's sums and sums of squares; `pitch` in bytes.
  void (*sums)(const int16_t* src, size_t pitch, int32_t height, int32_t width, int32_t channels, int64_t* sum,
               int64_t* squares);
  void (*winograd)(const CadyqWinograd* job, void* scratch);
  void (*direct)(const CadyqDirect* job, void* scratch);
  void (*columns)(const CadyqColumns* job, void* scratch);

  // What most sets have in common.
  int32_t code_block = 0;                     // `direct_block` for 8-bit weights, if it is another one
  int32_t run_block = 1;                      // runs of 8-bit weights are padded to multiples of so many bytes
  int32_t round_rows = 4, round_columns = 4;  // 3x3 kernels make pixels in groups of this size
  int32_t least_tile = 56, most_tile = 80;    // sides of tiles that suit the caches, where the plan leaves the choice
  int32_t code_offset = CADYQ_OFFSET_SIGNED;
  int32_t snaps_residual = 0;  // takes a target's `snap`, with outputs in multiples of 32 and slopes that are fractions
  // clamp16(rint(code * ratio)) of 8-bit codes as Winograd layers read them; multiples of 16 channels.
  void (*expand)(const uint8_t* codes, int32_t is_unsigned, int16_t* dst, int32_t pixels, int32_t channels,
                 const float* ratio) = nullptr;
  int32_t splits_values = CADYQ_SPLIT_NONE;
  // Four rows of columns of int16 codes at once, by Winograd F(4,3) along the columns; null: there is none. The kernel
  // is a multiple of three high, and codes have 8 bits.
  void (*columns4)(const CadyqColumns* job, void* scratch) = nullptr;
  // 5x5 convolution of int16 codes of 8 bits, as `winograd` is one of 3x3: rows[i] is pixel (x0 - 2) of row
  // (y0 - 2 + i), there are 4 * ceil(height / 4) + 5 rows, each readable for 4 * ceil(width / 4) + 5 pixels; the last of
  // each do not matter. Null: there is none.
  void (*winograd5)(const CadyqWinograd* job, void* scratch) = nullptr;
};

const CadyqKernels* cadyq_kernels_portable(void);
const CadyqKernels* cadyq_kernels_avx2(void);
const CadyqKernels* cadyq_kernels_avxvnni(void);
const CadyqKernels* cadyq_kernels_avx512vnni(void);
const CadyqKernels* cadyq_kernels_amx(void);
const CadyqKernels* cadyq_kernels_neondotprod(void);
// Whether the operating system lets this process use AMX's tiles; asks for it.
int cadyq_amx_allowed(void);
// Whether this processor has NEON's dot product extension.
int cadyq_has_dotprod(void);
}
