// A 3x3 layer as the engine's kernels compute it, alone: no quantization before it, no tiles around it. Built by
// kernels.py from the engine's own source, with KERNELS naming the instruction set's table,
// SIDE and CHANNELS the tile.
#include "kernels.h"

#include <cstdlib>
#include <vector>

namespace {

constexpr int kSide = SIDE, kChannels = CHANNELS;
constexpr size_t kPlane = static_cast<size_t>(kSide) * kSide * kChannels;

// Memory aligned as the engine's is.
template <class T>
T* take(size_t n) {
  return static_cast<T*>(std::aligned_alloc(4096, (n * sizeof(T) + 8191) / 4096 * 4096));
}

struct Layer {
  std::vector<const uint8_t*> rows;
  std::vector<uint8_t*> codes, sums;
  std::vector<const int16_t*> residual;
  std::vector<float> factor = std::vector<float>(kChannels, 1e-4f), bias = std::vector<float>(kChannels, 0.5f),
                     slope = std::vector<float>(kChannels, 0.f), multiplier = std::vector<float>(kChannels, 0.02f);
  CadyqWinograd to_codes{}, to_sums{};
  void* scratch;

  Layer() {
    const size_t pitch = (kSide + 2) * kChannels;
    auto* in = take<uint8_t>(pitch * (kSide + 2));
    auto* weights = take<int16_t>(36 * kChannels * kChannels);
    auto *out = take<uint8_t>(kPlane * 2), *codes_out = take<uint8_t>(kPlane);
    auto* added = take<int16_t>(kPlane);
    unsigned random = 1;
    auto next = [&] { return (random = random * 1664525u + 1013904223u) >> 16; };
    for (size_t i = 0; i < pitch * (kSide + 2); ++i) in[i] = static_cast<uint8_t>(next());
    for (int i = 0; i < 36 * kChannels * kChannels; ++i) weights[i] = static_cast<int16_t>(next() % 400) - 200;
    for (size_t i = 0; i < kPlane; ++i) added[i] = static_cast<int16_t>(next());
    for (int y = 0; y < kSide + 2; ++y) rows.push_back(in + y * pitch);
    for (int y = 0; y < kSide; ++y) {
      const size_t at = static_cast<size_t>(y) * kSide * kChannels;
      codes.push_back(codes_out + at);
      sums.push_back(out + at * 2);
      residual.push_back(added + at);
    }
    CadyqWinograd job{};
    job.rows = rows.data();
    job.height = job.width = kSide;
    job.c_in = job.c_out = kChannels;
    job.is_unsigned = 1;
    job.weights = weights;
    job.epilogue.factor = factor.data();
    job.epilogue.bias = bias.data();
    job.epilogue.slopes = CADYQ_FRACTIONS;
    job.target.shuffle = 1;
    job.target.channels = kChannels;
    to_sums = to_codes = job;
    to_codes.epilogue.slope = slope.data();
    to_codes.epilogue.slopes = CADYQ_ZEROS;
    to_codes.epilogue.store = CADYQ_CODE8;
    to_codes.epilogue.quantizer = {multiplier.data(), 0, 255, 1, 0, 1};
    to_codes.target.rows = codes.data();
    to_sums.epilogue.store = CADYQ_INT16;
    to_sums.target.rows = sums.data();
    to_sums.target.residual = residual.data();
    scratch = take<uint8_t>(KERNELS()->scratch_bytes(kChannels) + 4096);
  }
};

}  // namespace

// 8-bit codes to the codes of the next layer, as in the first half of a residual block; or to 16-bit values to which
// others are added, as in the second.
extern "C" void layer(int adds) {
  static Layer all;
  KERNELS()->winograd(adds ? &all.to_sums : &all.to_codes, all.scratch);
}
