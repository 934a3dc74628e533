// The storage types of tensors, and a matrix of them. For one FP_ISA, as all that includes this.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastpref {
namespace FP_ISA {
namespace {

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
