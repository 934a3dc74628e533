// Chooses the head's kernels at run time, and what needs no vectors: the label's own product.
#define FP_ISA baseline
#include "head_dispatch.h"
#include "storage.h"
#include "threads.h"

namespace fastpref {

#define FP_DECLARE(name) \
  namespace name { extern const HeadKernels kernels; }
FP_ISAS(FP_DECLARE)
#undef FP_DECLARE

const HeadKernels& head_kernels(const std::string& isa) {
  check_isa("head", isa);
#define FP_CHOOSE(name) \
  if (isa == #name) return name::kernels;
  FP_ISAS(FP_CHOOSE)
#undef FP_CHOOSE
  __builtin_unreachable();
}

using namespace baseline;

// Lanes of fp64, added in a fixed order: one sum would wait for itself at every step.
template <class X, class W, class Column>
static double dot(const X* x, const W* w, Column column, int64_t n) {
  constexpr int LANES = 16;
  double sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; ++j)
      sums[j] += static_cast<double>(to_float(x[i + j])) * static_cast<double>(to_float(w[(i + j) * column]));
  for (int j = 0; i + j < n; ++j) sums[j] += static_cast<double>(to_float(x[i + j])) * static_cast<double>(to_float(w[(i + j) * column]));
  double sum = 0;
  for (double lane : sums) sum += lane;
  return sum;
}

template <class X, class W>
static void dots(const void* hidden, const void* weight, const int64_t* targets, double* out, int64_t n, int64_t H, int64_t stride,
                 int64_t column, int threads) {
  const X* x = static_cast<const X*>(hidden);
  const W* w = static_cast<const W*>(weight);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; ++t)
    with_column(column, [&](auto column) { out[t] = dot(x + t * H, w + targets[t] * stride, column, H); });
}

void label_dots(const void* hidden, const void* weight, const int64_t* targets, double* out, int64_t n, int64_t hidden_size,
                int64_t weight_stride, Dtype dtype, int threads, int64_t weight_column, bool weight_fp32) {
  auto run = [&](auto dots) {
    on_live_threads(threads, [&] { dots(hidden, weight, targets, out, n, hidden_size, weight_stride, weight_column, threads); });
  };
  switch (dtype) {
    case kFloat32: return run(dots<float, float>);
    case kBFloat16: return run(weight_fp32 ? dots<bf16, AsBf16> : dots<bf16, bf16>);
    case kFloat16: return run(weight_fp32 ? dots<fp16, AsFp16> : dots<fp16, fp16>);
  }
}

}  // namespace fastpref
