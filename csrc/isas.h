// The instruction sets that the kernels are compiled for, and which of them this processor has.
//
//   FP_ISAS(X) is X(name) for each that the compiler knew (FP_HAVE_..., by setup.py), best first; a name is that of the
//   namespace its kernels stand in
#pragma once
#include <string>
#include <vector>

#ifdef FP_HAVE_AMX
#define FP_IF_AMX(X) X(amx)
#else
#define FP_IF_AMX(X)
#endif
#ifdef FP_HAVE_AVX512BF16
#define FP_IF_AVX512BF16(X) X(avx512bf16)
#else
#define FP_IF_AVX512BF16(X)
#endif
#ifdef FP_HAVE_AVX512
#define FP_IF_AVX512(X) X(avx512)
#else
#define FP_IF_AVX512(X)
#endif
#ifdef FP_HAVE_AVX2
#define FP_IF_AVX2(X) X(avx2)
#else
#define FP_IF_AVX2(X)
#endif
#define FP_ISAS(X) FP_IF_AMX(X) FP_IF_AVX512BF16(X) FP_IF_AVX512(X) FP_IF_AVX2(X) X(portable)

namespace fastpref {

// Usable on this processor, best first.
std::vector<std::string> isas();

// Throws std::invalid_argument, in the name of `op`, where `isa` is none of them.
void check_isa(const std::string& op, const std::string& isa);

}  // namespace fastpref
