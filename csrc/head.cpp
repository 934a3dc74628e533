// Chooses the head's kernels at run time, and what needs no vectors: the label's own product.
#include "head.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "head_dispatch.h"

namespace fastpref {

#ifdef FP_HAVE_AVX512BF16
namespace avx512bf16 { extern const HeadKernels kernels; }
#endif
#ifdef FP_HAVE_AVX512
namespace avx512 { extern const HeadKernels kernels; }
#endif
#ifdef FP_HAVE_AVX2
namespace avx2 { extern const HeadKernels kernels; }
#endif
namespace portable { extern const HeadKernels kernels; }

std::vector<std::string> head_isas() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#ifdef FP_HAVE_AVX512BF16
  if (v4 && __builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#endif
#ifdef FP_HAVE_AVX512
  if (v4) found.push_back("avx512");
#endif
#ifdef FP_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) found.push_back("avx2");
#endif
#endif
  found.push_back("portable");
  return found;
}

const HeadKernels& head_kernels(const std::string& isa) {
  for (const std::string& usable : head_isas()) {
    if (usable != isa) continue;
#ifdef FP_HAVE_AVX512BF16
    if (isa == "avx512bf16") return avx512bf16::kernels;
#endif
#ifdef FP_HAVE_AVX512
    if (isa == "avx512") return avx512::kernels;
#endif
#ifdef FP_HAVE_AVX2
    if (isa == "avx2") return avx2::kernels;
#endif
    return portable::kernels;
  }
  std::string known;
  for (const std::string& usable : head_isas()) known += (known.empty() ? "" : ", ") + usable;
  throw std::invalid_argument("head: FASTPREF_CPU_ISA must be one of " + known + " on this processor; got " + isa);
}

static double widen(const float* x, int64_t i) { return x[i]; }
static double widen(const uint16_t* x, int64_t i) {
  uint32_t u = static_cast<uint32_t>(x[i]) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
struct Half { uint16_t bits; };
static double widen(const Half* x, int64_t i) {
  const int exponent = x[i].bits >> 10 & 31, mantissa = x[i].bits & 1023;
  const double sign = x[i].bits >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

template <class S>
static void dots(const void* hidden, const void* weight, const int64_t* targets, double* out, int64_t n, int64_t H, int64_t stride,
                 int threads) {
  const S* x = static_cast<const S*>(hidden);
  const S* w = static_cast<const S*>(weight);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; ++t) {
    double sum = 0;
    for (int64_t h = 0; h < H; ++h) sum += widen(x, t * H + h) * widen(w, targets[t] * stride + h);
    out[t] = sum;
  }
}

void label_dots(const void* hidden, const void* weight, const int64_t* targets, double* out, int64_t n, int64_t hidden_size,
                int64_t weight_stride, Dtype dtype, int threads) {
  switch (dtype) {
    case kFloat32: return dots<float>(hidden, weight, targets, out, n, hidden_size, weight_stride, threads);
    case kBFloat16: return dots<uint16_t>(hidden, weight, targets, out, n, hidden_size, weight_stride, threads);
    case kFloat16: return dots<Half>(hidden, weight, targets, out, n, hidden_size, weight_stride, threads);
  }
}

}  // namespace fastpref
