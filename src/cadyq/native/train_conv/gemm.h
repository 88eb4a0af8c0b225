// The matrix product under all convolutions: C (rows x 1 or 2 vectors) = or += A (rows x depth) B (depth x vectors).
#pragma once
#include "vec.h"

namespace {

// A is read at a[i * row + k * step]. Rows are reached from every third one, so that x86 addressing modes
// (base, base + row, base + 2 row) do with six registers instead of one per row.
template <int R, int NV, bool kAdd, bool kUnitRow>
__attribute__((noinline)) void micro(const float* a, ptrdiff_t row, ptrdiff_t step, const float* b, ptrdiff_t b_step,
                                     int64_t depth, float* c, ptrdiff_t c_row) {
  if (kUnitRow) row = 1;
  constexpr int kBases = (R + 2) / 3;
  Vec acc[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec{};
  const float* base[kBases];
#pragma GCC unroll 16
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * row;
  for (int64_t k = 0; k < depth; ++k) {
    Vec bv[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) bv[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      Vec av = splat(base[i / 3][(i % 3) * row]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] += av * bv[v];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kBases; ++i) base[i] += step;
    b += b_step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* to = c + i * c_row + v * kWidth;
      store(to, kAdd ? acc[i][v] + load(to) : acc[i][v]);
    }
}

template <int R, int NV, bool kAdd, bool kUnitRow>
inline void micro_of(int rows, const float* a, ptrdiff_t row, ptrdiff_t step, const float* b, ptrdiff_t b_step,
                     int64_t depth, float* c, ptrdiff_t c_row) {
  if (rows == R) return micro<R, NV, kAdd, kUnitRow>(a, row, step, b, b_step, depth, c, c_row);
  if constexpr (R > 1) micro_of<R - 1, NV, kAdd, kUnitRow>(rows, a, row, step, b, b_step, depth, c, c_row);
}

// Splits the rows evenly, so that 64 become 13 13 13 13 12 and not 14 14 14 14 8.
template <bool kAdd, bool kUnitRow>
inline void gemm(int64_t rows, int n_vectors, const float* a, ptrdiff_t row, ptrdiff_t step, const float* b,
                 ptrdiff_t b_step, int64_t depth, float* c, ptrdiff_t c_row) {
  int64_t parts = ceil_div(rows, kRows);
  for (int64_t p = 0, i = 0; p < parts; ++p) {
    int r = static_cast<int>((rows - i + parts - p - 1) / (parts - p));
    if (n_vectors == 2)
      micro_of<kRows, 2, kAdd, kUnitRow>(r, a + i * row, row, step, b, b_step, depth, c + i * c_row, c_row);
    else
      micro_of<kRows, 1, kAdd, kUnitRow>(r, a + i * row, row, step, b, b_step, depth, c + i * c_row, c_row);
    i += r;
  }
}

}  // namespace
