#include "exits.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace cadyq {
namespace {

// Equation (17): grey levels up to 65280 or 65535, with one pixel repeated on either side.
template <class T>
void grey_row(const Levels& in, int y, int32_t* out) {
  constexpr int shift = sizeof(T) == 1 ? 8 : 16;
  y = std::min(std::max(y, 0), in.height - 1);
  const T* p = static_cast<const T*>(in.data) + static_cast<size_t>(y) * in.width * 3;
  for (int x = 0; x < in.width; ++x)
    out[1 + x] = static_cast<int32_t>((19595u * p[3 * x] + 38470u * p[3 * x + 1] + 7471u * p[3 * x + 2]) >> shift);
  out[0] = out[1];
  out[in.width + 1] = out[in.width];
}

// One row of cells.
template <class T>
void sum_cells(const Levels& in, int cell, int row, int64_t* out) {
  const int y0 = row * cell, y1 = std::min(in.height, y0 + cell), columns = (in.width + cell - 1) / cell;
  const size_t line = static_cast<size_t>(in.width) + 2;
  std::vector<int32_t> grey(3 * line), edges(static_cast<size_t>(columns) * cell * cell);
  int32_t *a = grey.data(), *b = a + line, *c = b + line;
  grey_row<T>(in, y0 - 1, a);
  grey_row<T>(in, y0, b);
  std::fill_n(out, static_cast<size_t>(columns) * kCellSums, 0);
  for (int y = y0; y < y1; ++y) {
    grey_row<T>(in, y + 1, c);
    for (int column = 0; column < columns; ++column) {
      const int x0 = column * cell, width = std::min(cell, in.width - x0);
      int32_t* edge = edges.data() + static_cast<size_t>(column) * cell * cell + static_cast<size_t>(y - y0) * width;
      const int32_t *p = a + x0 + 1, *q = b + x0 + 1, *r = c + x0 + 1;
      int64_t dx = 0, dy = 0, sum = 0, squares = 0;
      for (int x = 0; x < width; ++x) {
        dx += std::abs(p[x + 1] + 2 * q[x + 1] + r[x + 1] - p[x - 1] - 2 * q[x - 1] - r[x - 1]);
        dy += std::abs(r[x - 1] + 2 * r[x] + r[x + 1] - p[x - 1] - 2 * p[x] - p[x + 1]);
        edge[x] = std::abs(p[x] + r[x] + q[x - 1] + q[x + 1] - 4 * q[x]);
        sum += q[x];
        squares += static_cast<int64_t>(q[x]) * q[x];
      }
      int64_t* s = out + static_cast<size_t>(column) * kCellSums;
      s[0] += dx;
      s[1] += dy;
      s[5] += sum;
      s[6] += squares;
    }
    std::swap(a, b);
    std::swap(b, c);
  }
  for (int column = 0; column < columns; ++column) {
    const int width = std::min(cell, in.width - column * cell), n = width * (y1 - y0);
    int32_t *first = edges.data() + static_cast<size_t>(column) * cell * cell, *last = first + n;
    int64_t* s = out + static_cast<size_t>(column) * kCellSums;
    for (const int32_t* e = first; e < last; ++e) s[2] += *e;
    s[4] = *std::max_element(first, last);
    int32_t* at = first + static_cast<int64_t>(19) * (n - 1) / 20;
    std::nth_element(first, at, last);
    s[3] = *at;
  }
}

struct Box {  // LR pixels
  int y0, x0, y1, x1;
};

// Sums are exact: float holds 8-bit levels times 1/1024, double those of 16 bits.
template <class T>
using Exact = std::conditional_t<sizeof(T) == 1, float, double>;

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define CADYQ_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CADYQ_CLONES
#endif
#if defined(__GNUC__)
#define CADYQ_INLINE __attribute__((always_inline)) inline  // into each of the clones
#else
#define CADYQ_INLINE inline
#endif

// n results of four weighted values each, rounded half up and clamped.
template <class F, class To>
CADYQ_INLINE void weigh_each(const F* const from[4], const F weight[4], F largest, size_t n, To* to) {
  const F *a = from[0], *b = from[1], *c = from[2], *d = from[3];
  const F wa = weight[0], wb = weight[1], wc = weight[2], wd = weight[3];
  for (size_t i = 0; i < n; ++i) {
    F sum = wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i] + F(0.5);
    sum = sum < 0 ? F(0) : sum;
    sum = sum > largest ? largest : sum;
    to[i] = static_cast<To>(static_cast<int32_t>(sum));
  }
}

CADYQ_CLONES void weigh(const float* const from[4], const float weight[4], float largest, size_t n, float* to) {
  weigh_each(from, weight, largest, n, to);
}
CADYQ_CLONES void weigh(const float* const from[4], const float weight[4], float largest, size_t n, uint8_t* to) {
  weigh_each(from, weight, largest, n, to);
}
CADYQ_CLONES void weigh(const double* const from[4], const double weight[4], double largest, size_t n, double* to) {
  weigh_each(from, weight, largest, n, to);
}
CADYQ_CLONES void weigh(const double* const from[4], const double weight[4], double largest, size_t n, uint16_t* to) {
  weigh_each(from, weight, largest, n, to);
}

// Four of a phase's five weights: the first or the last is zero.
template <class F>
struct Phase {
  F weight[4];
  int first;  // neighbor of the first one

  explicit Phase(const float* five) : first(five[4] == 0 ? -2 : -1) {
    for (int k = 0; k < 4; ++k) weight[k] = static_cast<F>(five[first + 2 + k]) / 1024;
  }
};

template <class T>
class Filler {
 public:
  explicit Filler(const Fill& f) : f_(f), largest_(std::numeric_limits<T>::max()) {
    for (int p = 0; p < f.scale; ++p) phases_.emplace_back(f.weights + p * 5);
  }

  // One row of cells of the band.
  void run(int row) {
    const int width = f_.in.width, columns = (width + f_.cell - 1) / f_.cell;
    const int y0 = (f_.first + row) * f_.cell, y1 = std::min(f_.height, y0 + f_.cell);
    for (int c = 0; c < columns;) {
      int end = c + 1;
      if (gone(row, c)) {
        while (end < columns && gone(row, end)) ++end;
        write({y0, c * f_.cell, y1, std::min(width, end * f_.cell)}, [](int, int) { return 0; });
      } else if (f_.fade) {
        fade({y0, c * f_.cell, y1, std::min(width, end * f_.cell)}, row, c);
      }
      c = end;
    }
  }

 private:
  bool gone(int row, int column) const {  // -1 and beyond: around the band
    const int columns = (f_.in.width + f_.cell - 1) / f_.cell;
    return f_.exited[(row + 1) * (columns + 2) + column + 1] != 0;
  }

  // Equation (18) in a computed cell.
  void fade(const Box& cell, int row, int column) {
    bool near[3][3], any = false;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) any |= near[i][j] = gone(row + i - 1, column + j - 1);
    if (!any) return;
    const int s = f_.scale, full = 2 * f_.fade * s;
    const int top = cell.y0 * s, bottom = cell.y1 * s, left = cell.x0 * s, right = cell.x1 * s;
    // Shares grow from an edge inwards, in units of half a pixel.
    auto share = [&](int y, int x) {
      const int down[3] = {std::min(2 * (y - top) + 1, full), full, std::min(2 * (bottom - y) - 1, full)};
      const int side[3] = {std::min(2 * (x - left) + 1, full), full, std::min(2 * (right - x) - 1, full)};
      int least = full;
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
          // Distance to a neighbor at a corner is the larger of the two; to one at a side only that side counts.
          if (near[i][j]) least = std::min(least, i == 1 ? side[j] : j == 1 ? down[i] : std::max(down[i], side[j]));
      return least;
    };
    const int y[4] = {cell.y0, cell.y0 + f_.fade, cell.y1 - f_.fade, cell.y1};
    const int x[4] = {cell.x0, cell.x0 + f_.fade, cell.x1 - f_.fade, cell.x1};
    if (y[1] > y[2] || x[1] > x[2]) return write(cell, share);  // too small to have a middle
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        if ((i != 1 && near[i][1]) || (j != 1 && near[1][j]) || (i != 1 && j != 1 && near[i][j]))
          write({y[i], x[j], y[i + 1], x[j + 1]}, share);
  }

  // The plain picture; `share(y, x)` of 2 * fade are kept of what is there, 0 in all of a box or nowhere.
  template <class Share>
  void write(const Box& box, const Share& share) {
    if (box.y0 >= box.y1 || box.x0 >= box.x1) return;
    const int s = f_.scale, width = box.x1 - box.x0, rows = box.y1 - box.y0 + 4;
    const size_t line = static_cast<size_t>(width + 4) * 3, out_line = static_cast<size_t>(f_.in.width) * s * 3;
    source_.resize(rows * line);
    for (int r = 0; r < rows; ++r) load(mirrored(box.y0 - 2 + r, f_.height) - f_.top, box.x0 - 2, width + 4, &source_[r * line]);
    downward_.resize(line);
    across_.resize(s * (static_cast<size_t>(width) * 3 + 1));
    made_.resize(static_cast<size_t>(width) * s * 3);
    const bool is_mixed = share(box.y0 * s, box.x0 * s) != 0;
    for (int y = box.y0 * s; y < box.y1 * s; ++y) {
      const Phase<Exact<T>>& down = phases_[y % s];
      const Exact<T>* from[4];
      for (int k = 0; k < 4; ++k) from[k] = &source_[(y / s - box.y0 + 2 + down.first + k) * line];
      weigh(from, down.weight, largest_, line, downward_.data());
      T* to = static_cast<T*>(f_.out) + (static_cast<size_t>(y) - static_cast<size_t>(f_.first) * f_.cell * s) * out_line +
              static_cast<size_t>(box.x0) * s * 3;
      row(width, is_mixed ? made_.data() : to);
      if (!is_mixed) continue;
      const int64_t full = 2 * f_.fade * s;
      for (int x = 0; x < width * s; ++x) {
        const int64_t own = share(y, box.x0 * s + x);
        for (int c = 0; c < 3; ++c) {
          T& value = to[x * 3 + c];
          value = static_cast<T>((2 * (made_[x * 3 + c] * (full - own) + value * own) + full) / (2 * full));
        }
      }
    }
  }

  void load(int y, int x0, int n, Exact<T>* to) const {
    const T* row = static_cast<const T*>(f_.in.data) + static_cast<size_t>(y) * f_.in.width * 3;
    for (int x = x0; x < x0 + n; ++x, to += 3) {
      const T* p = row + static_cast<size_t>(x < 0 || x >= f_.in.width ? mirrored(x, f_.in.width) : x) * 3;
      for (int c = 0; c < 3; ++c) to[c] = static_cast<Exact<T>>(p[c]);
    }
  }

  // A row of the result from the one that was resized downwards: phase by phase, then in turns.
  void row(int width, T* to) {
    const int s = f_.scale;
    const size_t n = static_cast<size_t>(width) * 3;
    for (int q = 0; q < s; ++q) {
      const Exact<T>* from[4];
      for (int k = 0; k < 4; ++k) from[k] = downward_.data() + (2 + phases_[q].first + k) * 3;
      weigh(from, phases_[q].weight, largest_, n, &across_[q * (n + 1)]);
    }
    // Four values at once where three are meant: the fourth is overwritten by the next pixel, except at the end.
    for (int x = 0; x < width; ++x)
      for (int q = 0; q < s; ++q, to += 3)
        std::memcpy(to, &across_[q * (n + 1) + static_cast<size_t>(x) * 3], (x + 1 == width && q + 1 == s ? 3 : 4) * sizeof(T));
  }

  const Fill& f_;
  const Exact<T> largest_;
  std::vector<Phase<Exact<T>>> phases_;
  std::vector<Exact<T>> source_, downward_;
  std::vector<T> across_, made_;
};

template <class T>
void fill(Pool& pool, const Fill& f) {
  std::vector<Filler<T>> fillers(pool.threads(), Filler<T>(f));
  const int side = f.cell * f.scale;
  pool.run((f.out_height + side - 1) / side, [&](int row, int thread) { fillers[thread].run(row); });
}

}  // namespace

void cell_sums(Pool& pool, const Levels& in, int cell, int64_t* sums) {
  const int rows = (in.height + cell - 1) / cell, columns = (in.width + cell - 1) / cell;
  pool.run(rows, [&](int row, int) {
    int64_t* out = sums + static_cast<size_t>(row) * columns * kCellSums;
    if (in.wide)
      sum_cells<uint16_t>(in, cell, row, out);
    else
      sum_cells<uint8_t>(in, cell, row, out);
  });
}

void fill_exits(Pool& pool, const Fill& f) { f.in.wide ? fill<uint16_t>(pool, f) : fill<uint8_t>(pool, f); }

}  // namespace cadyq
