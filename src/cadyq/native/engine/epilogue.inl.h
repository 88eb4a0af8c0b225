// How accumulators become results, for every vector instruction set; included inside its namespace.

// ---- epilogue, equation (7) -------------------------------------------------------------------------------------

// Up to four pixels of kLanes channels from `channel` on: accumulators to the target.
struct EpilogueStore {
  const CadyqEpilogue& e;
  const Clamp clamp;
  const int shuffle, channels, element;
  const CadyqTarget& target;

  CADYQ_INLINE EpilogueStore(const CadyqEpilogue& epilogue, const CadyqTarget& t)
      : e(epilogue),
        clamp(epilogue.quantizer),
        shuffle(t.shuffle),
        channels(t.channels),
        element(epilogue.store == CADYQ_CODE8 ? 1 : 2),
        target(t) {}

  CADYQ_INLINE void operator()(int y, int x, int channel, int n, const I32 acc[4], float scale) const {
    const F32 factor = mul(load_f32(e.factor + channel), splat(scale)), bias = load_f32(e.bias + channel);
    F32 t[4];
    for (int i = 0; i < 4; ++i) t[i] = add(mul(to_f32(acc[i]), factor), bias);
    if (e.slope) {
      const F32 slope = load_f32(e.slope + channel);
      for (int i = 0; i < 4; ++i) t[i] = activate(t[i], slope);
    }
    int dy = 0, offset = x * channels + channel;
    if (shuffle != 1) {
      const int sub = channel / channels;
      dy = sub / shuffle;
      offset = (x * shuffle + sub % shuffle) * channels + channel % channels;
    }
    const int stride = shuffle * channels;
    const int row = y * shuffle + dy;
    if (e.store == CADYQ_INT16) {
      int16_t* p = reinterpret_cast<int16_t*>(target.rows[row]) + offset;
      const int16_t* r = target.residual ? target.residual[row] + offset : nullptr;
      if (e.gain) {
        const F32 gain = load_f32(e.gain + channel), most = splat(e.levels), least = splat(-e.levels);
        for (int i = 0; i < 4; ++i) t[i] = mul(round_clamped(t[i], least, most), gain);
      }
      for (int i = 0; i < 4; ++i)
        if (i < n) store_int16(p + i * stride, rint32(t[i]), r ? r + i * stride : nullptr, e.rectify != 0);
      return;
    }
    const F32 requant = load_f32(e.quantizer.multiplier + channel);
    I32 v[4];
    for (int i = 0; i < 4; ++i) v[i] = rint32(mul(round_clamped(t[i], splat(-32768.f), splat(32767.f)), requant));
    uint8_t* p = target.rows[row] + static_cast<size_t>(offset) * element;
    if (e.store == CADYQ_CODE8) {
      store_codes(p, stride, n, v, clamp);
    } else {
      for (int i = 0; i < n; ++i) store_code16(reinterpret_cast<int16_t*>(p) + i * stride, v[i], clamp);
    }
  }
};
