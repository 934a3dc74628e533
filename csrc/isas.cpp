// What this processor has.
#include "isas.h"

#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastpref {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives a process the 8 KiB of tile registers only if it asks; older ones know nothing of them.
bool may_use_tiles() {
#ifdef __linux__
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

bool is_usable(const std::string& isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == "amx") return has_avx512bf16() && may_use_tiles();
  if (isa == "avx512bf16") return has_avx512bf16();
  if (isa == "avx512") return has_avx512();
  if (isa == "avx2") return has_avx2();
#endif
  return isa == "portable";
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> found;
#define FP_ADD(name) \
  if (is_usable(#name)) found.push_back(#name);
  FP_ISAS(FP_ADD)
#undef FP_ADD
  return found;
}

void check_isa(const std::string& op, const std::string& isa) {
  std::string known;
  for (const std::string& usable : isas()) {
    if (usable == isa) return;
    known += (known.empty() ? "" : ", ") + usable;
  }
  throw std::invalid_argument(op + ": FASTPREF_CPU_ISA must be one of " + known + " on this processor; got " + isa);
}

}  // namespace fastpref
