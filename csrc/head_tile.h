// The register tiles: C (MR, NR) = or += A B, over `steps` operands along K. Included by csrc/head_isa.cpp alone.
//
//   A[i, k] at a[i * row + k / STEP * col + k % STEP], B packed (steps, NR), zeros past the end of K in either
//
// An operand is K values of K. A vector tile broadcasts A's operands one by one; AMX takes 16 rows of 16 pairs at once.
#pragma once
#include "vector.h"

#if defined(__AMX_BF16__) || defined(FP_AMX_INTRINSICS)
#define FP_AMX
#include "head_amx.h"
#endif

namespace fastpref {
namespace FP_ISA {
namespace {

template <class Op>
struct VectorTile {
#if defined(__AVX512F__)
  static constexpr int MR = 8, NRV = 3;
#elif defined(__AVX2__)
  static constexpr int MR = 6, NRV = 2;
#else
  static constexpr int MR = 4, NRV = 2;
#endif
  static constexpr int NR = NRV * VL, STEP = 1;
  // of an A packed in groups of MR rows
  static constexpr int64_t GROUP_ROW = 1, GROUP_COL = MR;
  struct Ready {};

  // of the NRV vectors of columns, the first WIDE
  template <int WIDE = NRV, class Operand>
  static inline __attribute__((always_inline)) void tile(int64_t steps, const Operand* a, int64_t row, int64_t col,
                                                         const Operand* b, float* c, int64_t ldc, bool add) {
    vfloat acc[MR][WIDE];
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < WIDE; ++j) acc[i][j] = vfloat{};
    for (int64_t k = 0; k < steps; ++k) {
      typename Op::Vector bv[WIDE];
      for (int j = 0; j < WIDE; ++j) std::memcpy(&bv[j], b + k * NR + j * VL, sizeof bv[j]);
      for (int i = 0; i < MR; ++i) {
        const Operand ai = a[i * row + k * col];
        for (int j = 0; j < WIDE; ++j) acc[i][j] = Op::fma(acc[i][j], ai, bv[j]);
      }
    }
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < WIDE; ++j) {
        float* p = c + i * ldc + j * VL;
        store(p, add ? load(p) + acc[i][j] : acc[i][j]);
      }
  }
};

struct Single : VectorTile<Single> {  // one fp32 along K
  typedef float Operand;
  typedef vfloat Vector;
  static constexpr int K = 1;
  template <class S> static Operand join(S x) { return to_float(x); }
  static vfloat fma(vfloat acc, Operand a, Vector b) { return acc + splat(a) * b; }
};

struct TwoBf16 {  // along K, in one 32-bit lane
  typedef uint32_t Operand;
  static constexpr int K = 2;
  template <class S> static Operand join(S x, S next) { return as_bf16(x) | static_cast<uint32_t>(as_bf16(next)) << 16; }
};

#ifdef __AVX512BF16__
struct Pair : TwoBf16, VectorTile<Pair> {
  typedef vuint Vector;
  static vfloat fma(vfloat acc, Operand a, Vector b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
};
#endif

#ifdef FP_AMX
struct Tiles : TwoBf16 {
  static constexpr int MR = 32, NR = 32, NRV = NR / VL, STEP = 16;
  static constexpr int64_t GROUP_ROW = STEP, GROUP_COL = MR * STEP;
  typedef TilesConfigured Ready;

  template <int WIDE = NRV>
  static void tile(int64_t steps, const Operand* a, int64_t row, int64_t col, const Operand* b, float* c, int64_t ldc, bool add) {
    constexpr bool BOTH = WIDE * VL > 16;  // halves of the columns
    // what was packed must be in memory: the intrinsics do not tell the compiler what they read
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    if constexpr (BOTH) _tile_zero(1);
    _tile_zero(2);
    if constexpr (BOTH) _tile_zero(3);
    for (int64_t k = 0; k < steps; k += STEP, a += col, b += STEP * NR) {
      _tile_loadd(4, a, row * 4);
      _tile_loadd(6, b, NR * 4);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (BOTH) _tile_loadd(7, b + 16, NR * 4);
      if constexpr (BOTH) _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * row, row * 4);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (BOTH) _tile_dpbf16ps(3, 5, 7);
    }
    alignas(64) float fresh[MR * NR];
    float* to = add ? fresh : c;
    const int64_t ld = add ? NR : ldc;
    _tile_stored(0, to, ld * 4);
    if constexpr (BOTH) _tile_stored(1, to + 16, ld * 4);
    _tile_stored(2, to + 16 * ld, ld * 4);
    if constexpr (BOTH) _tile_stored(3, to + 16 * ld + 16, ld * 4);
    if (!add) return;
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < (BOTH ? NR : 16); j += VL) store(c + i * ldc + j, load(c + i * ldc + j) + load(fresh + i * NR + j));
  }
};
#endif

// Of the NRV vectors of columns the first `wide`: same sums, without those of columns that nobody reads.
template <class Op, int WIDE = Op::NRV>
inline __attribute__((always_inline)) void tile_of(int64_t wide, int64_t steps, const typename Op::Operand* a, int64_t row, int64_t col,
                                                   const typename Op::Operand* b, float* c, int64_t ldc, bool add) {
  if constexpr (WIDE > 1)
    if (wide < WIDE) return tile_of<Op, WIDE - 1>(wide, steps, a, row, col, b, c, ldc, add);
  Op::template tile<WIDE>(steps, a, row, col, b, c, ldc, add);
}

}  // namespace
}  // namespace FP_ISA
}  // namespace fastpref
