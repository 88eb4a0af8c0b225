// Winograd for 64 inputs, with the transforms of neighbouring rounds mixed into the products. Included by
// avx512vnni.cpp after kernels.inl.h, whose staged version serves other shapes and is the same arithmetic.

constexpr size_t kPlane64 = kTiles * 128 + 64;
constexpr size_t kInputs = (36 * kPlane64 + 4095) / 4096 * 4096 + 512;  // not a multiple of 4096: cache sets
constexpr size_t kProducts = (36 * kProductPlane + 4095) / 4096 * 4096 + 512;
// With several blocks of outputs, this many rounds are multiplied by one block of weights before the next, so that
// weights too large for the cache are read once per group; one slot more holds the next group's first round.
constexpr int kGroup = 8, kSlots = kGroup + 1;
constexpr size_t kInterleavedScratch =
    kSlots * kInputs + 2 * kProducts + 36 * 128 + 24 * 256 + 2 * 4 * 4 * 128 + 16 * sizeof(Constants) + 4096;

class InterleavedRegion {
 public:
  InterleavedRegion(const CadyqWinograd& job, uint8_t* scratch)
      : job_(job), store_(job.epilogue, job.target), tw_((job.width + 3) / 4), n_tiles_((job.height + 3) / 4 * tw_) {
    uint8_t* p = scratch;
    auto take = [&](size_t bytes) {
      uint8_t* here = p;
      p += bytes;
      return here;
    };
    for (auto& slot : inputs_) slot = take(kInputs);
    products_[0] = take(kProducts);
    products_[1] = take(kProducts);
    z_ = take(36 * 128);
    o_ = take(24 * 256);
    spare_ = take(4 * 4 * 128);
    spare_residual_ = reinterpret_cast<int16_t*>(take(4 * 4 * 128));
    constants_ = reinterpret_cast<Constants*>(take(16 * sizeof(Constants)));
    for (int block = 0; block < job.c_out / 64; ++block) set_constants(constants_[block], block * 64);
    const CadyqQuantizer& q = job.epilogue.quantizer;
    const bool codes = job.epilogue.store != CADYQ_INT16;
    // Codes that are never negative make zeros of negative values as a rectifier does.
    const bool slope = job.epilogue.slope && !(codes && q.is_unsigned && job.epilogue.slopes == CADYQ_ZEROS);
    if (job.epilogue.gain)
      out_ = slope ? cadyq_wino_out_snapped_act : cadyq_wino_out_snapped;
    else if (job.epilogue.rectify)
      out_ = slope ? cadyq_wino_out_rectified_act : cadyq_wino_out_rectified;
    else if (job.epilogue.store == CADYQ_INT16)
      out_ = job.target.residual ? (slope ? cadyq_wino_out_residual_act : cadyq_wino_out_residual)
                                 : (slope ? cadyq_wino_out_int16_act : cadyq_wino_out_int16);
    else if (q.is_unsigned && q.covers)
      out_ = slope ? cadyq_wino_out_unsigned_covered_act : cadyq_wino_out_unsigned_covered;
    else if (q.is_unsigned)
      out_ = slope ? cadyq_wino_out_unsigned_act : cadyq_wino_out_unsigned;
    else if (q.covers)
      out_ = slope ? cadyq_wino_out_signed_covered_act : cadyq_wino_out_signed_covered;
    else
      out_ = slope ? cadyq_wino_out_signed_act : cadyq_wino_out_signed;
  }

  // An item is a round of tiles times a block of outputs. While it is multiplied, the results of the item before are
  // finished and inputs are transformed shortly before they are needed.
  void run() {
    const int blocks = job_.c_out / 64, rounds = (n_tiles_ + kTiles - 1) / kTiles, group = blocks > 1 ? kGroup : 1;
    slots_ = group + 1;
    for (int t = 0; t < tiles(0); ++t) input(0, t);
    Item before{-1, 0, nullptr};
    int parity = 0;
    for (int first = 0; first < rounds; first += group) {
      const int end = first + group < rounds ? first + group : rounds;
      for (int block = 0; block < blocks; ++block)
        for (int round = first; round < end; ++round, parity ^= 1) {
          const bool ahead = round + 1 < end ? block == 0 : block + 1 == blocks && round + 1 < rounds;
          const Item item{round, block, products_[parity]};
          multiply(item, before, ahead);
          before = item;
        }
    }
    for (int t = 0; t < tiles(before.round); ++t) output(before, t);
  }

 private:
  struct Item {
    int round, block;
    uint8_t* products;
  };
  struct Entry {
    Interleaved* function;
    Task task;
    bool before, after;
    int ty, tx, channel;
  };

  void multiply(const Item& item, const Item& before, bool ahead) {
      const int round = item.round, n = tiles(round), calls = 36 * ((n + 3) / 4);
      n_tasks_ = 0;
      int out = 0, in = 0;
      if (before.round >= 0)
        for (; out < tiles(before.round) && n_tasks_ + 6 <= calls; ++out) add_output(before, out);
      if (ahead)
        for (; in < tiles(round + 1) && n_tasks_ + 2 <= calls; ++in) add_input(round + 1, in);
      const uint8_t* v = inputs_[round % slots_];
      const int16_t* u = job_.weights + static_cast<size_t>(item.block) * 36 * 64 * 64;
      uint8_t* m = item.products;
      int call = 0, done = 0;
      for (int p = 0; p < 36; ++p, u += 64 * 64)
        for (int t = 0; t < n; t += 4, ++call) {
          if (job_.target.residual && call < 4 * n) fetch_residual(item, call / 4, call % 4);
          const uint8_t* from = v + p * kPlane64 + static_cast<size_t>(t) * 128;
          uint8_t* to = m + p * kProductPlane + static_cast<size_t>(t) * 256;
          if (done < n_tasks_ && done * calls <= call * n_tasks_) {
            const Entry& e = tasks_[done++];
            if (e.before) borrow_residual(e.ty, e.tx, e.channel);
            e.function(from, u, to, &e.task);
            if (e.after) return_results(e.ty, e.tx, e.channel);
          } else {
            cadyq_wino_plain(from, u, to, nullptr);
          }
        }
      if (before.round >= 0)
        for (; out < tiles(before.round); ++out) output(before, out);
      if (ahead)
        for (; in < tiles(round + 1); ++in) input(round + 1, in);
  }

  int tiles(int round) const { return n_tiles_ - round * kTiles < kTiles ? n_tiles_ - round * kTiles : kTiles; }

  void set_constants(Constants& c, int channel) const {
    const CadyqEpilogue& e = job_.epilogue;
    for (int i = 0; i < 64; ++i) {
      c.factor[i] = e.factor[channel + i] * 0.015625f;
      c.bias[i] = e.bias[channel + i];
      c.slope[i] = e.slope ? e.slope[channel + i] : 1.f;
      c.requant[i] = e.gain ? e.gain[channel + i] : e.store == CADYQ_INT16 ? 0.f : e.quantizer.multiplier[channel + i];
      c.low[i] = static_cast<int8_t>(e.quantizer.low);
      c.high[i] = static_cast<int8_t>(e.quantizer.high);
      c.flip[i] = static_cast<int8_t>(e.quantizer.flip);
    }
    c.inverse9 = kInverse9;
    c.max16 = e.gain ? e.levels : 32767.f;
    c.min16 = e.gain ? -e.levels : -32768.f;
    for (int i = 0; i < 16; ++i) c.order[i] = i / 4 + i % 4 * 4;
  }

  void input(int round, int t) {
    const int tile = round * kTiles + t;
    uint8_t* v = inputs_[round % slots_] + static_cast<size_t>(t) * 128;
    if (job_.is_unsigned)
      winograd_input<kUnsigned>(job_, tile / tw_ * 4, tile % tw_ * 4, v, kPlane64);
    else
      winograd_input<kSigned>(job_, tile / tw_ * 4, tile % tw_ * 4, v, kPlane64);
  }

  void output(const Item& item, int t) {
    const int tile = item.round * kTiles + t;
    for (int c = 0; c < 64; c += kLanes)
      winograd_output(job_, store_, tile / tw_, tile % tw_, item.block * 64 + c,
                      item.products + (static_cast<size_t>(t) * 64 + c) * 4);
  }

  // Asks for what a row of a tile's results will be added to. A picture's values do not fit into the caches near a core;
  // asked for a row at a time while the tile's products are made, they have come when the results are finished.
  // Always inline: GCC drops calls of a function that does nothing but fetch.
  CADYQ_INLINE void fetch_residual(const Item& item, int t, int row) const {
    const int tile = item.round * kTiles + t, y = tile / tw_ * 4 + row;
    if (y >= job_.height) return;
    const Destination d = destination(job_.target, 2, item.block * 64, y, tile % tw_ * 4);
    for (int i = 0; i < 4; ++i)
      for (int c = 0; c < 64; c += 32)
        _mm_prefetch(reinterpret_cast<const char*>(d.residual + i * d.stride + c), _MM_HINT_T0);
  }

  Entry& add(Interleaved* function) {
    Entry& e = tasks_[n_tasks_++];
    e.function = function;
    e.before = e.after = false;
    return e;
  }

  void add_input(int round, int t) {
    const int tile = round * kTiles + t;
    Entry& a = add(job_.is_unsigned ? cadyq_wino_in_columns_u : cadyq_wino_in_columns_s);
    for (int i = 0; i < 6; ++i)
      a.task.field[i] = job_.rows[tile / tw_ * 4 + i] + static_cast<size_t>(tile % tw_) * 4 * 64;
    a.task.field[6] = z_;
    Entry& b = add(cadyq_wino_in_rows);
    b.task.field[0] = z_;
    b.task.field[1] = inputs_[round % slots_] + static_cast<size_t>(t) * 128;
  }

  void add_output(const Item& item, int t) {
    const int tile = item.round * kTiles + t, ty = tile / tw_, tx = tile % tw_, block = item.block;
    for (int half = 0; half < 2; ++half) {
      Entry& c = add(cadyq_wino_out_columns);
      c.task.field[0] = item.products + static_cast<size_t>(t) * 256 + half * 128;
      c.task.field[1] = o_ + half * 128;
    }
    const CadyqTarget& target = job_.target;
    const int element = job_.epilogue.store == CADYQ_INT16 ? 2 : 1, s = target.shuffle;
    const bool clipped = 4 * ty + 4 > job_.height || 4 * tx + 4 > job_.width;
    const int sub = block * 64 / target.channels, first = block * 64 % target.channels;
    const size_t pixel = static_cast<size_t>(s) * target.channels * element;
    for (int part = 0; part < 4; ++part) {
      const int half = part % 2, first_row = part / 2 * 2;
      Entry& d = add(out_);
      d.task.field[0] = o_ + half * 128 + first_row * 6 * 256;
      d.task.field[1] = constants_[block].factor + half * 32;
      d.task.field[2] = reinterpret_cast<const void*>(static_cast<size_t>(half) * 32 * element);
      d.task.field[3] = reinterpret_cast<const void*>(clipped ? size_t{64} * element : pixel);
      d.task.field[4] = &constants_[block].inverse9;
      d.ty = ty;
      d.tx = tx;
      d.channel = block * 64;
      d.before = clipped && part == 0 && target.residual;
      d.after = clipped && part == 3;
      for (int i = 0; i < 2; ++i) {
        const int a = first_row + i;
        if (clipped) {
          d.task.destination[i] = spare_ + static_cast<size_t>(a) * 4 * 64 * element;
          d.task.residual[i] = spare_residual_ + a * 4 * 64;
          continue;
        }
        const int row = (4 * ty + a) * s + sub / s;
        const size_t at = (static_cast<size_t>(4 * tx) * s + sub % s) * target.channels + first;
        d.task.destination[i] = target.rows[row] + at * element;
        d.task.residual[i] = target.residual ? target.residual[row] + at : nullptr;
      }
    }
  }

  template <class F>
  void for_valid_pixels(int ty, int tx, int channel, const F& f) {
    const CadyqTarget& target = job_.target;
    const int s = target.shuffle, sub = channel / target.channels, first = channel % target.channels;
    for (int a = 0; a < 4 && 4 * ty + a < job_.height; ++a)
      for (int i = 0; i < 4 && 4 * tx + i < job_.width; ++i)
        f((4 * ty + a) * s + sub / s, (static_cast<size_t>(4 * tx + i) * s + sub % s) * target.channels + first,
          static_cast<size_t>(a * 4 + i) * 64);
  }
  void borrow_residual(int ty, int tx, int channel) {
    for_valid_pixels(ty, tx, channel, [&](int row, size_t at, size_t spare) {
      __builtin_memcpy(spare_residual_ + spare, job_.target.residual[row] + at, 128);
    });
  }
  void return_results(int ty, int tx, int channel) {
    const size_t element = job_.epilogue.store == CADYQ_INT16 ? 2 : 1;
    for_valid_pixels(ty, tx, channel, [&](int row, size_t at, size_t spare) {
      __builtin_memcpy(job_.target.rows[row] + at * element, spare_ + spare * element, 64 * element);
    });
  }

  const CadyqWinograd& job_;
  const EpilogueStore store_;
  const int tw_, n_tiles_;
  uint8_t *inputs_[kSlots], *products_[2], *z_, *o_, *spare_;
  int16_t* spare_residual_;
  Constants* constants_;
  Interleaved* out_;
  Entry tasks_[8 * kTiles];
  int n_tasks_ = 0, slots_ = 2;
};

void winograd_or_interleaved(const CadyqWinograd* job, void* scratch) {
  const bool fits = job->c_in == 64 && job->c_out % 64 == 0 && job->c_out <= 1024 && job->target.channels % 64 == 0 &&
                    job->epilogue.store != CADYQ_CODE16 && job->height > 0 && job->width > 0;
  const CadyqEpilogue& e = job->epilogue;
  const bool rare = (e.gain && (e.rectify || !job->target.residual)) || (e.rectify && !job->target.residual);
  if (fits && !rare)
    InterleavedRegion(*job, static_cast<uint8_t*>(scratch)).run();
  else
    winograd(job, scratch);
}

size_t scratch_bytes_interleaved(int32_t c_in_max) {
  const size_t staged = scratch_bytes(c_in_max);
  return staged > kInterleavedScratch ? staged : kInterleavedScratch;
}
