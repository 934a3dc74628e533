// Chooses GAE's kernel at run time, and gives it the rows.
#include "gae.h"

#include "isas.h"
#include "threads.h"

namespace fastpref {

#define FP_DECLARE(name) \
  namespace name { void gae_row(const GaeArgs& args, std::int64_t row); }
FP_ISAS(FP_DECLARE)
#undef FP_DECLARE

typedef void (*RowKernel)(const GaeArgs&, std::int64_t);

static RowKernel kernel_of(const std::string& isa) {
  check_isa("gae", isa);
#define FP_CHOOSE(name) \
  if (isa == #name) return name::gae_row;
  FP_ISAS(FP_CHOOSE)
#undef FP_CHOOSE
  __builtin_unreachable();
}

void gae_cpu(const std::string& isa, const GaeArgs& args, int n_threads) {
  const RowKernel row_kernel = kernel_of(isa);
  on_live_threads(n_threads, [&] {
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (std::int64_t row = 0; row < args.n_rows; ++row) row_kernel(args, row);
  });
}

}  // namespace fastpref
