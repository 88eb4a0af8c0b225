#include <cstring>

#include "abi.h"

namespace cadyq {

extern const ConvKernels conv_kernels_portable;
extern const MixtureKernels mixture_kernels_portable;
#if defined(CADYQ_HAVE_avx2)
extern const ConvKernels conv_kernels_avx2, conv_kernels_avx512;
extern const MixtureKernels mixture_kernels_avx2, mixture_kernels_avx512;
#endif

const Kernels* kernels_for(const char* isa) {
  static const Kernels portable{&conv_kernels_portable, &mixture_kernels_portable};
  if (!std::strcmp(isa, "portable")) return &portable;
#if defined(CADYQ_HAVE_avx2)
  static const Kernels avx2{&conv_kernels_avx2, &mixture_kernels_avx2};
  static const Kernels avx512{&conv_kernels_avx512, &mixture_kernels_avx512};
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(isa, "avx2") && has_avx2) return &avx2;
  if (!std::strcmp(isa, "avx512") && has_avx2 && __builtin_cpu_supports("avx512f")) return &avx512;
#endif
  return nullptr;
}

}  // namespace cadyq
