// Kernels in plain C++, for any machine: the same arithmetic without Winograd or vector instructions.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "scalar.h"

namespace {

constexpr int kOutputs = 16;

int32_t clamp16(int32_t v) { return std::min(32767, std::max(-32768, v)); }

void finish(const CadyqEpilogue& e, const CadyqTarget& t, int y, int x, int channel, int32_t acc) {
  float v = static_cast<float>(acc) * e.factor[channel];
  v = v + e.bias[channel];
  if (e.slope && v < 0) v = v * e.slope[channel];
  int32_t r = cadyq_round(v, -32768.f, 32767.f);
  if (e.gain) r = cadyq_round(cadyq_round(v, -e.levels, e.levels) * e.gain[channel], -32768.f, 32767.f);
  const int sub = channel / t.channels, dy = sub / t.shuffle, dx = sub % t.shuffle;
  const int row = y * t.shuffle + dy;
  const size_t at = static_cast<size_t>(x * t.shuffle + dx) * t.channels + channel % t.channels;
  if (e.store == CADYQ_INT16) {
    const int32_t base = t.residual ? t.residual[row][at] : 0;
    const int32_t sum = clamp16(base + r);
    reinterpret_cast<int16_t*>(t.rows[row])[at] = static_cast<int16_t>(e.rectify ? std::max(sum, 0) : sum);
  } else {
    cadyq_quantize_one(static_cast<float>(r), t.rows[row], at, e.quantizer.multiplier[channel], e.quantizer, e.store);
  }
}

// Sixteen outputs of one pixel; inputs come in pairs, as the weights are packed.
void accumulate(const uint8_t* const* rows, size_t offset, int n_rows, int steps, const int16_t* w, int32_t acc[kOutputs]) {
  for (int r = 0; r < n_rows; ++r) {
    const int16_t* x = reinterpret_cast<const int16_t*>(rows[r] + offset);
    for (int s = 0; s < steps; ++s, w += 2 * kOutputs)
      for (int o = 0; o < kOutputs; ++o) acc[o] += x[2 * s] * w[2 * o] + x[2 * s + 1] * w[2 * o + 1];
  }
}

void direct(const CadyqDirect* job, void*) {
  const int steps = (job->run_bytes + 3) / 4;
  const size_t block_size = static_cast<size_t>(job->kernel) * steps * kOutputs * 2;
  for (int block = 0; block < job->c_out; block += kOutputs)
    for (int y = 0; y < job->height; ++y)
      for (int x = 0; x < job->width; ++x) {
        int32_t acc[kOutputs];
        std::copy(job->init + block, job->init + block + kOutputs, acc);
        accumulate(job->rows + y, static_cast<size_t>(x) * job->pixel_bytes, job->kernel, steps,
                   static_cast<const int16_t*>(job->weights) + block / kOutputs * block_size, acc);
        for (int o = 0; o < kOutputs; ++o) finish(job->epilogue, job->target, y, x, block + o, acc[o]);
      }
}

void columns(const CadyqColumns* job, void*) {
  const int k = job->kernel, steps = job->pixel_bytes / 4;
  const size_t half = static_cast<size_t>(k) * steps * kOutputs * 2;
  int32_t sums[2 * kOutputs * 4] = {};  // of the last k pixels; there are no more than outputs of a column
  for (int x = 0; x < job->width + k - 1; ++x) {
    int32_t partial[2 * kOutputs];
    std::copy(job->init, job->init + 2 * kOutputs, partial);
    for (int h = 0; h < 2; ++h)
      accumulate(job->rows, static_cast<size_t>(x) * job->pixel_bytes, k, steps,
                 static_cast<const int16_t*>(job->weights) + h * half, partial + h * kOutputs);
    for (int dx = 0; dx < k && dx <= x; ++dx)
      for (int o = 0; o < job->c_out; ++o) sums[(x - dx) % k * 4 + o] += partial[dx * job->c_out + o];
    const int done = x - k + 1;  // has all of its sums
    if (done < 0) continue;
    for (int o = 0; o < job->c_out; ++o) {
      int32_t& sum = sums[done % k * 4 + o];
      float t = static_cast<float>(sum) * job->factor[o];
      t = t + job->bias[o];
      if (job->slope && t < 0) t = t * job->slope[o];
      job->values[static_cast<size_t>(done) * 4 + o] = static_cast<int16_t>(cadyq_round(t, -32768.f, 32767.f));
      sum = 0;
    }
  }
}

void quantize(const int16_t* src, int32_t src_stride, void* dst, int32_t dst_stride, int32_t pixels, int32_t channels,
              const CadyqQuantizer* q, int32_t store, int32_t) {
  for (int x = 0; x < pixels; ++x)
    for (int c = 0; c < channels; ++c)
      cadyq_quantize_one(src[static_cast<size_t>(x) * src_stride + c], dst, static_cast<size_t>(x) * dst_stride + c,
                         q->multiplier[c], *q, store);
}

void snap(const int16_t* src, int32_t src_stride, int16_t* dst, int32_t dst_stride, int32_t pixels, int32_t channels,
          const CadyqSnap* s) {
  for (int x = 0; x < pixels; ++x)
    for (int c = 0; c < channels; ++c)
      dst[static_cast<size_t>(x) * dst_stride + c] = cadyq_snap_one(src[static_cast<size_t>(x) * src_stride + c], c, *s);
}

void sums(const int16_t* src, size_t pitch, int32_t height, int32_t width, int32_t channels, int64_t* sum,
          int64_t* squares) {
  for (int y = 0; y < height; ++y) {
    const int16_t* row = reinterpret_cast<const int16_t*>(reinterpret_cast<const uint8_t*>(src) + y * pitch);
    for (int x = 0; x < width; ++x)
      for (int c = 0; c < channels; ++c) {
        const int64_t v = row[static_cast<size_t>(x) * channels + c];
        sum[c] += v;
        squares[c] += v * v;
      }
  }
}

size_t scratch_bytes(int32_t) { return 64; }

}  // namespace

extern "C" const CadyqKernels* cadyq_kernels_portable(void) {
  static const CadyqKernels k = {"portable",    0,        kOutputs, 1,    kOutputs, 2,      32,
                                 scratch_bytes, quantize, snap,     sums, nullptr,  direct, columns};
  return &k;
}
