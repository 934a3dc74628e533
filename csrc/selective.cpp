// Chooses the kernels of selective_logps at run time.
#include "selective.h"

#include "head_dispatch.h"

namespace fastpref {

#ifdef FP_HAVE_AVX512
namespace avx512 { extern const SelectiveKernels selective; }
#endif
#ifdef FP_HAVE_AVX2
namespace avx2 { extern const SelectiveKernels selective; }
#endif
namespace portable { extern const SelectiveKernels selective; }

const SelectiveKernels& selective_kernels(const std::string& isa) {
  head_kernels(isa);  // refuses what this processor does not have
#ifdef FP_HAVE_AVX512
  if (isa.rfind("avx2", 0) && isa != "portable") return avx512::selective;  // matrix units are of no use here
#endif
#ifdef FP_HAVE_AVX2
  if (isa != "portable") return avx2::selective;
#endif
  return portable::selective;
}

}  // namespace fastpref
