// Multiply-adds of 16-bit integers in registers, as fast as one core does them: the ceiling of the Winograd kernels.
// Built and called by kernels.py. Each function runs `rounds` rounds and returns the multiply-adds they made.
#include <cstdint>

#if defined(__x86_64__)
extern "C" int64_t peak_avx512vnni(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
#define STEP(n) "vpdpwssd %%zmm30, %%zmm31, %%zmm" #n "\n"
    asm volatile(STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
                 STEP(12) STEP(13) STEP(14) STEP(15)::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",
                 "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef STEP
  }
  return rounds * 16 * 32;
}

extern "C" int64_t peak_avxvnni(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
#define STEP(n) "%{vex%} vpdpwssd %%ymm14, %%ymm15, %%ymm" #n "\n"
    asm volatile(STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
                 ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
#undef STEP
  }
  return rounds * 12 * 16;
}

extern "C" int64_t peak_avx2(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
// Products go to three registers in turn, sums to nine others.
#define STEP(p, n) "vpmaddwd %%ymm14, %%ymm15, %%ymm" #p "\n vpaddd %%ymm" #p ", %%ymm" #n ", %%ymm" #n "\n"
    asm volatile(STEP(9, 0) STEP(10, 1) STEP(11, 2) STEP(9, 3) STEP(10, 4) STEP(11, 5) STEP(9, 6) STEP(10, 7)
                 STEP(11, 8)::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                 "xmm10", "xmm11");
#undef STEP
  }
  return rounds * 9 * 16;
}
#endif
