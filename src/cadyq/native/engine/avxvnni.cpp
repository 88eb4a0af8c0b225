// Kernels for AVX-VNNI: those of AVX2 with its multiply-add.
#define CADYQ_AVXVNNI
#include "avx2.cpp"
