// GAE on the CPU, compiled once for each instruction set (FP_ISA names the namespace); csrc/gae.cpp chooses.
//
// With G = V + lam A a step is an affine map of G to its right:
//   A_t = r_t - V_t + gamma G_next,   G_t = V_t + lam (r_t - V_t) + gamma lam G_next
// A masked step is the identity, a terminal one has slope 0. A vector of steps is scanned by maps composed at distance
// 1, 2, 4, ... (Hillis and Steele 1986), so that time stays contiguous in memory; what crosses to the next vector is one
// number, kept in double: the error does not grow with T.
#include "gae.h"

#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

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
typedef std::int32_t vint __attribute__((vector_size(4 * VL)));
typedef std::uint8_t vbyte __attribute__((vector_size(VL)));
typedef double vdouble __attribute__((vector_size(8 * VL)));

inline vfloat splat(double x) { return static_cast<float>(x) - vfloat{}; }

template <class V, class T>
inline V load(const T* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// lane i is lane i + D of x, and of `beyond` past its end
template <int D>
inline vfloat shifted(vfloat x, vfloat beyond) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_alignr_epi32(0xffff, (__m512i)beyond, (__m512i)x, D);
#elif defined(__clang__)
  vfloat y;
  for (int i = 0; i < VL; ++i) y[i] = i + D < VL ? x[i + D] : beyond[i + D - VL];
  return y;
#else
  vint from;
  for (int i = 0; i < VL; ++i) from[i] = i + D;
  return __builtin_shuffle(x, beyond, from);
#endif
}

struct Steps {  // VL of them, each the map G -> offset + slope G
  vfloat offset, slope;
};

// steps(g), where a step is TERMINAL without a look at g: a NaN after it must not cross it
template <bool TERMINAL>
inline vfloat apply(Steps s, vfloat g) {
  const vfloat all = s.offset + s.slope * g;
  return TERMINAL ? s.slope == 0 ? s.offset : all : all;
}

// each step with those to its right, as far as the vector goes
template <int D, bool TERMINAL>
inline Steps composed(Steps s) {
  if constexpr (D < VL) {
    s.offset = apply<TERMINAL>(s, shifted<D>(s.offset, vfloat{}));
    s.slope *= shifted<D>(s.slope, splat(1));
    return composed<2 * D, TERMINAL>(s);
  }
  return s;
}

// the same where every step is live and none terminal: the slopes are the powers of gamma lam
template <int D>
inline vfloat composed(vfloat offset, vfloat powers) {
  if constexpr (D < VL) {
    offset += splat(powers[VL - D]) * shifted<D>(offset, vfloat{});
    return composed<2 * D>(offset, powers);
  }
  return offset;
}

inline bool any(vbyte x) {
  std::uint64_t words[(sizeof x + 7) / 8] = {}, found = 0;
  std::memcpy(words, &x, sizeof x);
  for (std::uint64_t word : words) found |= word;
  return found;
}

struct Discounts {
  const float gamma, lam;
  const double slope;    // gamma lam
  double all_steps = 1;  // slope^VL
  vfloat powers;         // slope^(VL - i)

  Discounts(double gamma, double lam)
      : gamma(static_cast<float>(gamma)), lam(static_cast<float>(lam)), slope(gamma * lam) {
    for (int i = VL - 1; i >= 0; --i) powers[i] = static_cast<float>(all_steps *= slope);
  }
};

struct Moments {
  vint count{};
  vdouble sum{}, sum_sq{};
};

// VL steps: the G to their left, of the one to their right. mask, dones and moments may be null.
inline __attribute__((always_inline)) double block(const Discounts& by, double g, const float* rewards,
                                                   const float* values, const std::uint8_t* mask,
                                                   const std::uint8_t* dones, float* advantages, float* returns,
                                                   Moments* moments) {
  const vbyte live = mask ? load<vbyte>(mask) : vbyte{} + 1, terminal = dones ? load<vbyte>(dones) : vbyte{};
  if (!any(live)) {
    std::memset(advantages, 0, sizeof(vfloat));
    std::memset(returns, 0, sizeof(vfloat));
    return g;
  }
  vfloat reward = load<vfloat>(rewards), value = load<vfloat>(values), later;
  double g_left;
  if (!any((live == 0) | (terminal != 0))) {
    const vfloat offset = composed<1>(value + by.lam * (reward - value), by.powers);
    later = by.gamma * shifted<1>(offset + by.powers * splat(g), splat(g));
    g_left = offset[0] + by.all_steps * g;
  } else {
    const vint is_live = __builtin_convertvector(live, vint) != 0;
    const vint goes_on = is_live & (__builtin_convertvector(terminal, vint) == 0);
    reward = is_live ? reward : vfloat{};
    value = is_live ? value : vfloat{};
    Steps s = {value + by.lam * (reward - value), goes_on ? splat(by.slope) : is_live ? vfloat{} : splat(1)};
    vfloat g_here;
    if (any((live != 0) & (terminal != 0))) {
      s = composed<1, true>(s);
      g_here = apply<true>(s, splat(g));
      g_left = s.slope[0] == 0 ? s.offset[0] : s.offset[0] + s.slope[0] * g;
    } else {
      s = composed<1, false>(s);
      g_here = apply<false>(s, splat(g));
      g_left = s.offset[0] + s.slope[0] * g;
    }
    later = goes_on ? by.gamma * shifted<1>(g_here, splat(g)) : vfloat{};
  }
  const vfloat advantage = reward - value + later, ret = reward + later;
  std::memcpy(advantages, &advantage, sizeof advantage);
  std::memcpy(returns, &ret, sizeof ret);
  if (moments) {
    moments->count -= __builtin_convertvector(live, vint) != 0;
    const vdouble wide = __builtin_convertvector(advantage, vdouble);
    moments->sum += wide;
    moments->sum_sq += wide * wide;
  }
  return g_left;
}

template <bool MOMENTS>
void row_of(const GaeArgs& args, std::int64_t row) {
  const std::int64_t start = row * args.n_steps;
  const float* const rewards = args.rewards + start;
  const float* const values = args.values + start;
  const std::uint8_t* const mask = args.mask ? args.mask + start : nullptr;
  const std::uint8_t* const dones = args.dones ? args.dones + start : nullptr;
  float* const advantages = args.advantages + start;
  float* const returns = args.returns + start;

  const Discounts by(args.gamma, args.lam);
  Moments moments;
  double g = args.bootstrap ? args.bootstrap[row] : 0.0;
  std::int64_t t = args.n_steps;
  while (t >= VL) {
    t -= VL;
    g = block(by, g, rewards + t, values + t, mask ? mask + t : nullptr, dones ? dones + t : nullptr, advantages + t,
              returns + t, MOMENTS ? &moments : nullptr);
  }
  if (t) {  // the first few steps, behind masked ones
    float r[VL] = {}, v[VL] = {}, a[VL], ret[VL];
    std::uint8_t m[VL] = {}, d[VL] = {};
    const std::int64_t pad = VL - t;
    std::memcpy(r + pad, rewards, t * sizeof(float));
    std::memcpy(v + pad, values, t * sizeof(float));
    if (mask) std::memcpy(m + pad, mask, t); else std::memset(m + pad, 1, t);
    if (dones) std::memcpy(d + pad, dones, t);
    block(by, g, r, v, m, d, a, ret, MOMENTS ? &moments : nullptr);
    std::memcpy(advantages, a + pad, t * sizeof(float));
    std::memcpy(returns, ret + pad, t * sizeof(float));
  }
  if (MOMENTS) {
    double* const sums = args.sums + 3 * row;
    sums[0] = sums[1] = sums[2] = 0;
    for (int i = 0; i < VL; ++i) {
      sums[0] += moments.count[i];
      sums[1] += moments.sum[i];
      sums[2] += moments.sum_sq[i];
    }
  }
}

}  // namespace

void gae_row(const GaeArgs& args, std::int64_t row);
void gae_row(const GaeArgs& args, std::int64_t row) {
  args.sums ? row_of<true>(args, row) : row_of<false>(args, row);
}

}  // namespace FP_ISA
}  // namespace fastpref
