// Chooses the kernels of selective_logps at run time.
#include "selective.h"

#include "isas.h"

namespace fastpref {

#define FP_DECLARE(name) \
  namespace name { extern const SelectiveKernels selective; }
FP_ISAS(FP_DECLARE)
#undef FP_DECLARE

const SelectiveKernels& selective_kernels(const std::string& isa) {
  check_isa("selective_logps", isa);
#define FP_CHOOSE(name) \
  if (isa == #name) return name::selective;
  FP_ISAS(FP_CHOOSE)
#undef FP_CHOOSE
  __builtin_unreachable();
}

}  // namespace fastpref
