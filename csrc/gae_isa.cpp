// GAE on the CPU, compiled once for each instruction set (FP_ISA names the namespace); csrc/gae.cpp chooses.
//
// With G = V + lam A a step is an affine map of G to its right:
//   A_t = r_t - V_t + gamma G_next,   G_t = V_t + lam (r_t - V_t) + gamma lam G_next
// A masked step is the identity, a terminal one has slope 0. A vector of steps is scanned by maps composed at distance
// 1, 2, 4, ... (Hillis and Steele 1986), so that time stays contiguous in memory; what crosses to the next vector is one
// number, kept in double: the error does not grow with T.
#include "gae.h"

#include "vector.h"

namespace fastpref {
namespace FP_ISA {
namespace {

template <class V, class T>
inline V load_as(const T* p) {
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
    s.slope *= shifted<D>(s.slope, splat(1.f));
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

// A flag for each of VL bytes that is not 0.
#ifdef __AVX512F__
typedef __mmask16 Flags;
constexpr Flags NONE = 0, ALL = 0xffff;
inline Flags flags(const std::uint8_t* p) {
  const __m128i x = load_as<__m128i>(p);
  return _mm_test_epi8_mask(x, x);
}
inline bool any(Flags f) { return f; }
inline vfloat choose(Flags f, vfloat a, vfloat b) { return (vfloat)_mm512_mask_blend_ps(f, (__m512)b, (__m512)a); }
inline vint ones(Flags f) { return (vint)_mm512_maskz_set1_epi32(f, 1); }
inline vint lanes() { return vint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
// 0 where a step is not live
inline vfloat sum(Flags live, vfloat a, vfloat b) { return (vfloat)_mm512_maskz_add_ps(live, (__m512)a, (__m512)b); }
#else
typedef std::int8_t Flags __attribute__((vector_size(VL)));
constexpr Flags NONE = {}, ALL = ~NONE;
inline Flags flags(const std::uint8_t* p) { return load_as<Flags>(p) != 0; }
inline bool any(Flags f) {
  std::uint64_t words[(sizeof f + 7) / 8] = {}, found = 0;
  std::memcpy(words, &f, sizeof f);
  for (std::uint64_t word : words) found |= word;
  return found;
}
inline vfloat choose(Flags f, vfloat a, vfloat b) { return __builtin_convertvector(f, vint) ? a : b; }
inline vint ones(Flags f) { return -__builtin_convertvector(f, vint); }
// without a mask for it, block() makes a and b 0 where a step is not live
inline vfloat sum(Flags, vfloat a, vfloat b) { return a + b; }
#endif

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

// slope^n; apart from Discounts, whose members stay in registers as long as none is looked up by its number
struct Powers {
  double of[VL + 1] = {1};
  explicit Powers(double slope) {
    for (int n = 1; n <= VL; ++n) of[n] = of[n - 1] * slope;
  }
};

struct Moments {
  vint count{};
  vdouble sum{}, sum_sq{};
};

// VL steps: the G to their left, of the one to their right. mask, dones and moments may be null.
inline __attribute__((always_inline)) double block(const Discounts& by, [[maybe_unused]] const Powers& slope, double g,
                                                   const float* rewards, const float* values, const std::uint8_t* mask,
                                                   const std::uint8_t* dones, float* advantages, float* returns,
                                                   Moments* moments) {
  const Flags live = mask ? flags(mask) : ALL;
  if (!any(live)) {
    std::memset(advantages, 0, sizeof(vfloat));
    std::memset(returns, 0, sizeof(vfloat));
    return g;
  }
  const Flags terminal = dones ? Flags(flags(dones) & live) : NONE, masked = ~live;
  const vfloat right = splat(static_cast<float>(g));
  vfloat reward = load(rewards), value = load(values), later;
  double g_left;
  if (!any(Flags(masked | terminal))) {
    const vfloat offset = composed<1>(value + by.lam * (reward - value), by.powers);
    later = by.gamma * shifted<1>(offset + by.powers * right, right);
    g_left = offset[0] + by.all_steps * g;
#ifdef __AVX512F__
  } else if (!any(terminal)) {
    // the live steps side by side, in the first n lanes; identities follow them. Of __builtin_popcount GCC 12 makes the
    // instruction of 16 bits, and the loop takes twice as long
    const int n = _mm_popcnt_u32(_cvtmask16_u32(live));
    const vfloat steps = (vfloat)_mm512_maskz_compress_ps(live, (__m512)(value + by.lam * (reward - value)));
    const vfloat offset = composed<1>(steps, by.powers);
    const vint from = lanes() + (VL - n);  // slope^(n - i), and past the last step 1
    const vfloat powers = (vfloat)_mm512_permutex2var_ps((__m512)by.powers, (__m512i)from, (__m512)splat(1.f));
    const vfloat g_here = offset + powers * right;
    later = (vfloat)_mm512_maskz_expand_ps(live, (__m512)(by.gamma * shifted<1>(g_here, right)));
    g_left = offset[0] + slope.of[n] * g;
#endif
  } else {
    reward = choose(live, reward, vfloat{});
    value = choose(live, value, vfloat{});
    const vfloat steps = value + by.lam * (reward - value);
    Steps s = {steps, choose(terminal, vfloat{}, choose(live, splat(static_cast<float>(by.slope)), splat(1.f)))};
    vfloat g_here;
    if (any(terminal)) {
      s = composed<1, true>(s);
      g_here = apply<true>(s, right);
      g_left = s.slope[0] == 0 ? s.offset[0] : s.offset[0] + s.slope[0] * g;
    } else {
      s = composed<1, false>(s);
      g_here = apply<false>(s, right);
      g_left = s.offset[0] + s.slope[0] * g;
    }
    later = choose(Flags(masked | terminal), vfloat{}, by.gamma * shifted<1>(g_here, right));
  }
  const vfloat advantage = sum(live, reward - value, later), ret = sum(live, reward, later);
  std::memcpy(advantages, &advantage, sizeof advantage);
  std::memcpy(returns, &ret, sizeof ret);
  if (moments) {
    moments->count += ones(live);
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
  const Powers slope(by.slope);
  Moments moments;
  double g = args.bootstrap ? args.bootstrap[row] : 0.0;
  std::int64_t t = args.n_steps;
  while (t >= VL) {
    t -= VL;
    g = block(by, slope, g, rewards + t, values + t, mask ? mask + t : nullptr, dones ? dones + t : nullptr,
              advantages + t, returns + t, MOMENTS ? &moments : nullptr);
  }
  if (t) {  // the first few steps, behind masked ones
    float r[VL] = {}, v[VL] = {}, a[VL], ret[VL];
    std::uint8_t m[VL] = {}, d[VL] = {};
    const std::int64_t pad = VL - t;
    std::memcpy(r + pad, rewards, t * sizeof(float));
    std::memcpy(v + pad, values, t * sizeof(float));
    if (mask) std::memcpy(m + pad, mask, t); else std::memset(m + pad, 1, t);
    if (dones) std::memcpy(d + pad, dones, t);
    block(by, slope, g, r, v, m, d, a, ret, MOMENTS ? &moments : nullptr);
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
