// Chooses GAE's kernel at run time, and gives it the rows.
#include "gae.h"

#include <algorithm>
#include <stdexcept>

#include "head_dispatch.h"
#include "threads.h"

namespace fastpref {

#ifdef FP_HAVE_AMX
namespace amx { void gae_row(const GaeArgs& args, std::int64_t row); }
#endif
#ifdef FP_HAVE_AVX512BF16
namespace avx512bf16 { void gae_row(const GaeArgs& args, std::int64_t row); }
#endif
#ifdef FP_HAVE_AVX512
namespace avx512 { void gae_row(const GaeArgs& args, std::int64_t row); }
#endif
#ifdef FP_HAVE_AVX2
namespace avx2 { void gae_row(const GaeArgs& args, std::int64_t row); }
#endif
namespace portable { void gae_row(const GaeArgs& args, std::int64_t row); }

typedef void (*RowKernel)(const GaeArgs&, std::int64_t);

static RowKernel kernel_of(const std::string& isa) {
  const std::vector<std::string> usable = head_isas();
  if (std::find(usable.begin(), usable.end(), isa) == usable.end())
    throw std::invalid_argument("gae: FASTPREF_CPU_ISA is not one that this processor has; got " + isa);
#ifdef FP_HAVE_AMX
  if (isa == "amx") return amx::gae_row;
#endif
#ifdef FP_HAVE_AVX512BF16
  if (isa == "avx512bf16") return avx512bf16::gae_row;
#endif
#ifdef FP_HAVE_AVX512
  if (isa == "avx512") return avx512::gae_row;
#endif
#ifdef FP_HAVE_AVX2
  if (isa == "avx2") return avx2::gae_row;
#endif
  return portable::gae_row;
}

void gae_cpu(const std::string& isa, const GaeArgs& args, int n_threads) {
  const RowKernel row_kernel = kernel_of(isa);
  on_live_threads(n_threads, [&] {
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (std::int64_t row = 0; row < args.n_rows; ++row) row_kernel(args, row);
  });
}

}  // namespace fastpref
