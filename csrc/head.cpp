// Chooses the head's kernels at run time, and what needs no vectors: the label's own product.
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define FP_ISA baseline
#include "head_dispatch.h"
#include "storage.h"
#include "threads.h"

namespace fastpref {

#ifdef FP_HAVE_AMX
namespace amx { extern const HeadKernels kernels; }
#endif
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

#ifdef FP_HAVE_AMX
// Linux gives a process the 8 KiB of tile registers only if it asks; older ones know nothing of them.
static bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  static const bool granted = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16) && (edx & kTile) &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

std::vector<std::string> head_isas() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#ifdef FP_HAVE_AMX
  if (v4 && __builtin_cpu_supports("avx512bf16") && may_use_tiles()) found.push_back("amx");
#endif
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
#ifdef FP_HAVE_AMX
    if (isa == "amx") return amx::kernels;
#endif
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
