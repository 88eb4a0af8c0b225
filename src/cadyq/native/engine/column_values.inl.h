// For the instruction sets of x86; included inside the namespace of one.

// Results of a convolution with few outputs: sums along diagonals of its columns' partial sums, which are `pitch` apart.
// With Times24, sums are 24 times too large; equation (13a).
template <bool Times24 = false>
CADYQ_INLINE void column_values(const int32_t* partial, int pitch, int n, const CadyqColumns& job, int16_t* values) {
  constexpr int kInverse3 = -1431655765;
  const __m128 given = _mm_loadu_ps(job.factor);
  const __m128 factor = Times24 ? _mm_mul_ps(given, _mm_set1_ps(0.125f)) : given, bias = _mm_loadu_ps(job.bias);
  const __m128 slope = job.slope ? _mm_loadu_ps(job.slope) : _mm_set1_ps(1.f);
  const __m128 low = _mm_set1_ps(-32768.f), high = _mm_set1_ps(32767.f);
  for (int x = 0; x < n; ++x) {
    const int32_t* p = partial + static_cast<size_t>(x) * pitch;
    __m128i sum = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    for (int dx = 1; dx < job.kernel; ++dx)
      sum = _mm_add_epi32(sum, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + dx * (pitch + job.c_out))));
    if (Times24) sum = _mm_mullo_epi32(sum, _mm_set1_epi32(kInverse3));
    __m128 t = _mm_add_ps(_mm_mul_ps(_mm_cvtepi32_ps(sum), factor), bias);
    t = _mm_blendv_ps(t, _mm_mul_ps(t, slope), t);
    const __m128i v = _mm_cvtps_epi32(_mm_max_ps(_mm_min_ps(t, high), low));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(values + static_cast<size_t>(x) * 4), _mm_packs_epi32(v, v));
  }
}
