// Vectors of one instruction set, and the storage types of tensors. For one FP_ISA, as all that includes this.
#pragma once
#ifdef __AVX512F__
// GCC 12 takes its own _mm512_undefined_ps for a mistake
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

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
typedef float vhalf __attribute__((vector_size(2 * VL)));
typedef double vdouble __attribute__((vector_size(4 * VL)));  // VL / 2 of them
typedef double vdouble_u __attribute__((vector_size(4 * VL), aligned(8), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * VL)));
typedef uint32_t vuint __attribute__((vector_size(4 * VL)));
typedef uint16_t vshort __attribute__((vector_size(2 * VL)));
typedef uint16_t vshort_u __attribute__((vector_size(2 * VL), aligned(2), may_alias));

inline vfloat splat(float x) { return x - vfloat{}; }
inline vint splat(int32_t x) { return x - vint{}; }
inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_u*>(p); }
inline void store(float* p, vfloat x) { *reinterpret_cast<vfloat_u*>(p) = x; }

// ---- lanes -----------------------------------------------------------------------------------------------------

#ifdef __AVX512F__
typedef __mmask16 Lanes;
inline Lanes first_lanes(int64_t n) { return n >= VL ? 0xffff : n > 0 ? (1 << n) - 1 : 0; }
inline Lanes differ(Lanes among, vint a, vint b) { return _mm512_mask_cmpneq_epi32_mask(among, (__m512i)a, (__m512i)b); }
// a NaN is not below
inline Lanes not_below(Lanes among, vfloat a, vfloat b) { return _mm512_mask_cmp_ps_mask(among, a, b, _CMP_NLT_UQ); }
inline vfloat keep(Lanes lanes, vfloat x) { return _mm512_maskz_mov_ps(lanes, x); }
// a NaN is not larger
inline vfloat larger(Lanes lanes, vfloat x, vfloat than) { return _mm512_mask_max_ps(than, lanes, x, than); }
inline vdouble widen_low(vfloat x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline vdouble widen_high(vfloat x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
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
inline vdouble widen_low(vfloat x) {
  vhalf half;
  std::memcpy(&half, &x, sizeof half);
  return __builtin_convertvector(half, vdouble);
}
inline vdouble widen_high(vfloat x) {
  vhalf half;
  std::memcpy(&half, reinterpret_cast<const char*>(&x) + sizeof half, sizeof half);
  return __builtin_convertvector(half, vdouble);
}
#endif

// ---- storage types ---------------------------------------------------------------------------------------------

inline float bits_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

// round to nearest even; a NaN stays a NaN
inline uint16_t to_bf16(float f) {
  const uint32_t u = float_bits(f);
  return f != f ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float round_to_fp16(float f) {
  const uint32_t u = float_bits(f), sign = u & 0x80000000;
  const float size = bits_float(u ^ sign);
  const float normal = bits_float((float_bits(size) + 0xfff + ((u >> 13) & 1)) & 0xffffe000);
  const float subnormal = (size + 0.5f) - 0.5f;  // where fp32's last place is that of fp16's subnormals, 2^-24
  float rounded = size < 0x1p-14f ? subnormal : normal;
  rounded = rounded > 65504.f ? __builtin_inff() : rounded;
  return f != f ? f : bits_float(float_bits(rounded) | sign);
}

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
// fp32 in memory, read as if the tensor had been cast
struct AsBf16 { float value; };
struct AsFp16 { float value; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  uint32_t magnitude = float_bits(bits_float(static_cast<uint32_t>(x.bits & 0x7fff) << 13) * 0x1p112f);
  magnitude |= (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return bits_float(magnitude | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}
inline float to_float(AsBf16 x) { return to_float(bf16{to_bf16(x.value)}); }
inline float to_float(AsFp16 x) { return round_to_fp16(x.value); }
template <class S>
inline uint16_t as_bf16(S x) { return to_bf16(to_float(x)); }
inline uint16_t as_bf16(bf16 x) { return x.bits; }
inline uint16_t as_bf16(AsBf16 x) { return to_bf16(x.value); }

template <class S>
struct Matrix {  // element (i, j) at data[i * row + j * column]
  const S* data;
  int64_t row, column;
  const S* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
  Matrix from(int64_t i) const { return {at(i, 0), row, column}; }
};

// Calls f with the column stride, as a constant where it is 1: only then do its loops become vector loads.
template <class F>
inline void with_column(int64_t column, F f) {
  if (column == 1) f(std::integral_constant<int64_t, 1>());
  else f(column);
}

}  // namespace
}  // namespace FP_ISA
}  // namespace fastpref
