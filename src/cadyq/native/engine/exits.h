// Cells that leave the network: what is measured of them, and what they become. docs/numerics.md, section 9.
#pragma once
#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace cadyq {

struct Levels {
  const void* data;  // (height, width, 3)
  int height, width;
  bool wide;  // uint16
};

// Numbers per cell: sums of |dx|, |dy| and |Laplacian|, the latter's order statistic and maximum, sums of the grey
// levels and of their squares.
constexpr int kCellSums = 7;

// sums: (rows, columns, kCellSums).
void cell_sums(Pool& pool, const Levels& in, int cell, int64_t* sums);

struct Fill {
  Levels in;              // rows of the picture from `top` on, all that the band depends on
  int top, height;        // of the whole picture
  const float* weights;   // (scale, 5): of a result's row or column by phase, neighbors -2 to 2; in 1/1024
  int scale, cell, fade;  // LR pixels
  const uint8_t* exited;  // (rows + 2, columns + 2): of the band's cells and of those around it
  int first;              // row of cells with which the band begins
  void* out;              // (out_height, width scale, 3)
  int out_height;
};

void fill_exits(Pool& pool, const Fill& fill);

// Place of pixel i of n, mirrored at the ends as often as it takes.
inline int mirrored(int i, int n) {
  const int period = 2 * n, at = ((i % period) + period) % period;
  return std::min(at, period - 1 - at);
}

}  // namespace cadyq
