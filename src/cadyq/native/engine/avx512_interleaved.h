// Declarations of what avx512_interleaved.py writes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cadyq_avx512 {

// in_columns: six rows of codes, then Z. in_rows: Z, transformed inputs. out_columns: products, O.
// out_*: two rows of O, constants of the first channel, byte offset in the pixel, bytes between pixels, fixed constants.
struct Task {
  const void* field[8];
  uint8_t* destination[2];
  const int16_t* residual[2];
};

struct alignas(64) Constants {
  float factor[64], bias[64], slope[64], requant[64];
  // from here on "fixed"
  int32_t inverse9;
  float max16, min16;
  int32_t unused[13];
  int8_t low[64], high[64], flip[64];
  int32_t order[16];
};
static_assert(offsetof(Constants, inverse9) == 1024 && offsetof(Constants, low) == 1088 &&
                  offsetof(Constants, order) == 1280 && offsetof(Task, destination) == 64 && offsetof(Task, residual) == 80,
              "the assembly relies on this layout");

using Interleaved = void(const void* v, const void* u, void* m, const Task* task);

extern "C" {
Interleaved cadyq_wino_plain, cadyq_wino_in_columns_s, cadyq_wino_in_columns_u, cadyq_wino_in_rows,
    cadyq_wino_out_columns, cadyq_wino_out_signed, cadyq_wino_out_signed_act, cadyq_wino_out_unsigned,
    cadyq_wino_out_unsigned_act, cadyq_wino_out_signed_covered, cadyq_wino_out_signed_covered_act,
    cadyq_wino_out_unsigned_covered, cadyq_wino_out_unsigned_covered_act, cadyq_wino_out_int16,
    cadyq_wino_out_int16_act, cadyq_wino_out_residual,
    cadyq_wino_out_residual_act, cadyq_wino_out_rectified, cadyq_wino_out_rectified_act, cadyq_wino_out_snapped,
    cadyq_wino_out_snapped_act;
}

}  // namespace cadyq_avx512
