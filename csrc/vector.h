// Vectors of VL floats in the instruction set a file is compiled for (FP_ISA names the namespace), and what kernels do
// to them: loads and stores, 16-bit floats among them, lanes, exp, tanh.
#pragma once
#ifdef __AVX512F__
// GCC 12 takes its own _mm512_undefined_ps for a mistake
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cstring>

#include "storage.h"

namespace fastpref {
namespace FP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * VL)));
typedef float vfloat_u __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef float vhalf __attribute__((vector_size(2 * VL)));     // half of a vfloat
typedef double vdouble __attribute__((vector_size(8 * VL)));  // as many lanes as a vfloat, in two registers
typedef double vdouble_half __attribute__((vector_size(4 * VL)));
typedef double vdouble_half_u __attribute__((vector_size(4 * VL), aligned(8), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * VL)));
typedef uint32_t vuint __attribute__((vector_size(4 * VL)));
typedef uint16_t vshort __attribute__((vector_size(2 * VL)));
typedef uint16_t vshort_u __attribute__((vector_size(2 * VL), aligned(2), may_alias));

inline vfloat splat(float x) { return x - vfloat{}; }
inline vint splat(int32_t x) { return x - vint{}; }

inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_u*>(p); }
inline vuint load_bits(const void* p) { return __builtin_convertvector(*static_cast<const vshort_u*>(p), vuint); }
inline vfloat load(const bf16* p) { return (vfloat)(load_bits(p) << 16); }
inline vfloat load(const fp16* p) {
  const vuint x = load_bits(p);
  // the exponent is rebiased by a product, which also takes the subnormals along
  const vuint magnitude = (vuint)((vfloat)((x & 0x7fff) << 13) * 0x1p112f);
  const vuint special = (x & 0x7c00) == 0x7c00 ? vuint{} + 0x7f800000 : vuint{};  // infinity and NaN
  return (vfloat)(magnitude | special | (x & 0x8000) << 16);
}

// Stores round to nearest even; a NaN stays a NaN.
inline void store(float* p, vfloat x) { *reinterpret_cast<vfloat_u*>(p) = x; }
inline void store_bits(void* p, vuint x) { *static_cast<vshort_u*>(p) = __builtin_convertvector(x, vshort); }
inline void store(bf16* p, vfloat x) {
  const vuint u = (vuint)x;
  store_bits(p, x != x ? vuint{} + 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void store(fp16* p, vfloat x) {
  const vuint u = (vuint)x, a = u & 0x7fffffff;
  const vuint normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  const vuint subnormal = (vuint)((vfloat)a + 0.5f) - 0x3f000000;  // 0.5 has the ulp of a subnormal fp16
  const vuint infinite = a > 0x7f800000 ? vuint{} + 0x7e00 : vuint{} + 0x7c00;
  const vuint finite = a < 0x38800000 ? subnormal : normal;
  store_bits(p, (a >= 0x477ff000 ? infinite : finite) | (u >> 16 & 0x8000));  // 65520 and up round to infinity
}

#ifdef __AVX512F__
typedef __mmask16 Lanes;
inline Lanes first_lanes(int64_t n) { return n >= VL ? 0xffff : n > 0 ? (1 << n) - 1 : 0; }
inline Lanes differ(Lanes among, vint a, vint b) { return _mm512_mask_cmpneq_epi32_mask(among, (__m512i)a, (__m512i)b); }
// a NaN is not below
inline Lanes not_below(Lanes among, vfloat a, vfloat b) { return _mm512_mask_cmp_ps_mask(among, a, b, _CMP_NLT_UQ); }
inline vfloat keep(Lanes lanes, vfloat x) { return _mm512_maskz_mov_ps(lanes, x); }
// a NaN is not larger
inline vfloat larger(Lanes lanes, vfloat x, vfloat than) { return _mm512_mask_max_ps(than, lanes, x, than); }
inline vdouble_half widen_low(vfloat x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline vdouble_half widen_high(vfloat x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
#else
typedef vint Lanes;
inline Lanes first_lanes(int64_t n) {
  Lanes lanes;
  for (int i = 0; i < VL; ++i) lanes[i] = i < n ? -1 : 0;
  return lanes;
}
inline Lanes differ(Lanes among, vint a, vint b) { return among & (a != b); }
inline Lanes not_below(Lanes among, vfloat a, vfloat b) { return among & ~(a < b); }
inline vfloat keep(Lanes lanes, vfloat x) { return (vfloat)((vint)x & lanes); }
inline vfloat larger(Lanes lanes, vfloat x, vfloat than) { return (lanes & (x > than)) ? x : than; }
inline vdouble_half widen_low(vfloat x) {
  vhalf half;
  std::memcpy(&half, &x, sizeof half);
  return __builtin_convertvector(half, vdouble_half);
}
inline vdouble_half widen_high(vfloat x) {
  vhalf half;
  std::memcpy(&half, reinterpret_cast<const char*>(&x) + sizeof half, sizeof half);
  return __builtin_convertvector(half, vdouble_half);
}
#endif

// Cephes expf: 1 ulp on [-87, 80], held at 80 above; not defined below
inline vfloat vexp_above(vfloat x) {
  const vfloat high = splat(80.f);
  vfloat d = high < x ? high : x;
#ifdef __AVX512F__
  const vfloat n = _mm512_roundscale_ps(d * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vfloat magic = splat(12582912.f);
  const vfloat n = (d * 1.44269504f + magic) - magic;
#endif
  d = d - n * 0.693359375f;
  d = d + n * 2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * d + 1.3981999507e-3f;
  p = p * d + 8.3334519073e-3f;
  p = p * d + 4.1665795894e-2f;
  p = p * d + 1.6666665459e-1f;
  p = p * d + 5.0000001201e-1f;
  p = p * (d * d) + (d + 1.f);
#ifdef __AVX512F__
  return _mm512_scalef_ps(p, n);
#else
  // the scale is multiplied in, not added to the exponent: a NaN must stay one
  const vint exponent = (__builtin_convertvector(n, vint) + 127) << 23;
  return p * (vfloat)exponent;
#endif
}

inline vfloat vexp(vfloat x) { return x < splat(-87.f) ? vfloat{} : vexp_above(x); }  // 0 below

// Cephes tanhf.
inline vfloat vtanh(vfloat x) {
  const vfloat s = x * x;
  vfloat p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const vfloat small = x + x * s * p;
  const vfloat twice = x + x, low = splat(-87.f);
  const vfloat large = 1.f - 2.f / (vexp_above(twice < low ? low : twice) + 1.f);
  return s < splat(0.390625f) ? small : large;
}

}  // namespace
}  // namespace FP_ISA
}  // namespace fastpref
