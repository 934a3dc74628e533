// What becomes of a tile of products: exponentials, their sums, the stored chunk. Included by csrc/head_isa.cpp alone.
#pragma once
#include "head.h"
#include "vector.h"

namespace fastpref {
namespace FP_ISA {
namespace {

constexpr int64_t FLUSH = 8;  // vocabulary rows summed in fp32 before they are added in fp64

inline void store_chunk(float* p, vfloat x) { store(p, x); }
inline void store_chunk(uint16_t* p, vfloat x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
#else
  const vuint u = (vuint)x;
  const vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  *reinterpret_cast<vshort_u*>(p) = __builtin_convertvector(x != x ? (vuint{} + 0x7fc0) : rounded, vshort);
#endif
}

// The rows of a score, padded to whole vectors.
struct Tokens {
  const int32_t* target;
  const float *anchor, *inv_temperature, *c0, *c1;
  double* sums;  // (kSums, ld_sums) of this block of the vocabulary
  int64_t n, ld_sums;
};

enum Logits { kPlain, kScaled, kCapped };  // x . w itself; with a bias or a scale; with a softcap

// One vector of tokens against `rows` vocabulary rows of raw products c, `ldc` apart.
template <Logits LOGITS, class T>
void add_rows(const Scoring& s, const Tokens& tokens, int64_t t, const float* c, int64_t ldc, int64_t first_v, int64_t rows, T* stored) {
  vint target;
  std::memcpy(&target, tokens.target + t, sizeof target);
  const Lanes inside = first_lanes(tokens.n - t);
  const vfloat anchor = load(tokens.anchor + t), inv_t = load(tokens.inv_temperature + t);
  const vfloat c0 = load(tokens.c0 + t), c1 = load(tokens.c1 + t);
  const float inv_cap = LOGITS == kCapped ? 1.f / s.softcap : 0.f;
  constexpr int HALF = VL / 2;

  double* out = tokens.sums + t;
  auto total = [&](int k, int half) -> vdouble_half_u& { return *reinterpret_cast<vdouble_half_u*>(out + k * tokens.ld_sums + half * HALF); };
  vdouble_half low[kMaxD], high[kMaxD];
  for (int k = 0; k < kMaxD; ++k) low[k] = total(k, 0), high[k] = total(k, 1);
  // in fp32 over a few rows only: entropy is the difference of two sums, and feels the rounding of both
  vfloat sum[kMaxD] = {}, max_d = splat(-__builtin_inff());
  for (int64_t v = 0; v < rows; ++v) {
    vfloat z = load(c + v * ldc), slope = splat(1.f);
    if constexpr (LOGITS != kPlain) z = (z + (s.bias ? s.bias[first_v + v] : 0.f)) * s.logit_scale;
    if constexpr (LOGITS == kCapped) {
      const vfloat th = vtanh(z * inv_cap);
      z = th * s.softcap;
      slope = 1.f - th * th;
    }
    const vfloat d = z * inv_t - anchor;
    const Lanes other = differ(inside, target, splat(static_cast<int32_t>(first_v + v)));
    const Lanes live = not_below(other, d, splat(-87.f));  // the rest counts as 0: no 0 * inf, no denormals
    const vfloat e = keep(live, vexp_above(d)), live_d = keep(live, d);
    sum[kSumExp] += e;
    sum[kSumExpD] += e * live_d;
    sum[kSumExpSq] += e * e;
    sum[kSumZ] += z * inv_t;
    max_d = larger(other, d, max_d);
    if (stored) {
      vfloat f = e;
      if (s.c0) f = keep(live, f * (c0 + live_d * c1));
      if constexpr (LOGITS == kCapped) f = keep(live, f * slope);
      store_chunk(stored + (first_v + v) * s.stride + t, f);
    }
    if (v % FLUSH == FLUSH - 1 || v == rows - 1)
      for (int k = 0; k < kMaxD; ++k) {
        low[k] += widen_low(sum[k]);
        high[k] += widen_high(sum[k]);
        sum[k] = vfloat{};
      }
  }
  for (int k = 0; k < kMaxD; ++k) total(k, 0) = low[k], total(k, 1) = high[k];
  const vdouble_half max_low = widen_low(max_d), max_high = widen_high(max_d);
  vdouble_half_u &best_low = total(kMaxD, 0), &best_high = total(kMaxD, 1);
  best_low = max_low > best_low ? max_low : best_low;
  best_high = max_high > best_high ? max_high : best_high;
}

}  // namespace
}  // namespace FP_ISA
}  // namespace fastpref
