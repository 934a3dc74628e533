// The head's kernels, compiled once for each instruction set (FP_ISA names the namespace); csrc/head.cpp chooses.
//
// One register tile serves three products: MR rows whose operands are broadcast, NR columns in vectors.
//   score     C[v, t] = sum_h W[v, h] X[t, h]     rows read in place, X packed once
//   d_weight  C[v, h] = sum_t F[v, t] X'[t, h]    rows read in place, X' packed once
//   d_hidden  C[t, h] = sum_v F[v, t] W[v, h]     both packed, a block of V at a time
// An operand is one fp32, or with AVX512-BF16 a pair of bf16 along K. Accumulators start afresh every KC of K, so that
// fp32 rounding does not grow with H. What is not summed in registers is summed in a fixed order: same bits every run.
#include "head.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace fastpref {
namespace FP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 8, NRV = 3;
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6, NRV = 2;
#else
constexpr int VL = 4, MR = 4, NRV = 2;
#endif
constexpr int NR = VL * NRV;
constexpr int64_t KC = 256;  // of K between two fresh accumulators
constexpr int64_t FLUSH = 8;  // vocabulary rows summed in fp32 before they are added in fp64
constexpr int64_t MC = 96;   // rows a thread keeps close while it walks the columns
static_assert(MC % MR == 0 && kVocabBlock % MC == 0 && kTokenPad % VL == 0, "blocks must nest");

typedef float vfloat __attribute__((vector_size(4 * VL)));
typedef float vfloat_u __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef double vdouble __attribute__((vector_size(8 * VL)));
typedef double vdouble_u __attribute__((vector_size(8 * VL), aligned(8), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * VL)));
typedef uint32_t vuint __attribute__((vector_size(4 * VL)));
typedef uint16_t vshort __attribute__((vector_size(2 * VL)));
typedef uint16_t vshort_u __attribute__((vector_size(2 * VL), aligned(2), may_alias));

inline vfloat splat(float x) { return x - vfloat{}; }
inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_u*>(p); }
inline void store(float* p, vfloat x) { *reinterpret_cast<vfloat_u*>(p) = x; }

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// 64-byte aligned, uninitialised. Made before a parallel region: an exception must not leave one.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n) : data(static_cast<T*>(std::aligned_alloc(64, round_up(n * sizeof(T) + 1, 64)))) {
    if (!data) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// ---- storage types ---------------------------------------------------------------------------------------------

inline float bits_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

// round to nearest even; a NaN stays a NaN
inline uint16_t to_bf16(float f) {
  uint32_t u = float_bits(f);
  return f != f ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  uint32_t magnitude = float_bits(bits_float(static_cast<uint32_t>(x.bits & 0x7fff) << 13) * 0x1p112f);
  if ((x.bits & 0x7c00) == 0x7c00) magnitude |= 0x7f800000;
  return bits_float(magnitude | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}
inline uint16_t as_bf16(float x) { return to_bf16(x); }
inline uint16_t as_bf16(bf16 x) { return x.bits; }
inline uint16_t as_bf16(fp16 x) { return to_bf16(to_float(x)); }

// ---- operands of the register tile -----------------------------------------------------------------------------

struct Single {  // one fp32 along K
  typedef float Operand;
  typedef vfloat Vector;
  static constexpr int K = 1;
  template <class S> static Operand at(const S* p, int64_t, int64_t) { return to_float(p[0]); }
  static vfloat fma(vfloat acc, Operand a, Vector b) { return acc + splat(a) * b; }
};

#ifdef __AVX512BF16__
struct Pair {  // two bf16 along K in one 32-bit lane
  typedef uint32_t Operand;
  typedef vuint Vector;
  static constexpr int K = 2;
  // the pair at p and p + step; past the end (left < 2) the second is zero
  template <class S> static Operand at(const S* p, int64_t step, int64_t left) {
    return as_bf16(p[0]) | static_cast<uint32_t>(left > 1 ? as_bf16(p[step]) : 0) << 16;
  }
  static vfloat fma(vfloat acc, Operand a, Vector b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
};
#endif

// C (MR, NR) = or += A B over `steps` operands of K: A[i, k] = a[i * row + k * col], B packed (steps, NR).
template <class Op>
inline __attribute__((always_inline)) void tile(int64_t steps, const typename Op::Operand* a, int64_t row, int64_t col,
                                                const typename Op::Operand* b, float* c, int64_t ldc, bool add) {
  vfloat acc[MR][NRV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NRV; ++j) acc[i][j] = vfloat{};
  for (int64_t k = 0; k < steps; ++k) {
    typename Op::Vector bv[NRV];
    for (int j = 0; j < NRV; ++j) std::memcpy(&bv[j], b + k * NR + j * VL, sizeof bv[j]);
    for (int i = 0; i < MR; ++i) {
      const typename Op::Operand ai = a[i * row + k * col];
      for (int j = 0; j < NRV; ++j) acc[i][j] = Op::fma(acc[i][j], ai, bv[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NRV; ++j) {
      float* p = c + i * ldc + j * VL;
      store(p, add ? load(p) + acc[i][j] : acc[i][j]);
    }
}

// ---- packing ---------------------------------------------------------------------------------------------------

// Columns [first, first + NR) of a source whose rows are contiguous along K, as (steps, NR); zero past n.
template <class Op, class S>
void pack_columns(const S* x, int64_t ld, int64_t n, int64_t size_k, int64_t first, typename Op::Operand* out) {
  const int64_t steps = (size_k + Op::K - 1) / Op::K;
  for (int j = 0; j < NR; ++j) {
    const S* row = x + (first + j) * ld;
    for (int64_t k = 0; k < steps; ++k)
      out[k * NR + j] = first + j < n ? Op::at(row + k * Op::K, 1, size_k - k * Op::K) : 0;
  }
}

// A (size_k, n) source with K outermost, as panels (n / WIDTH, steps, WIDTH); zero past n.
template <class Op, int WIDTH, class S>
void pack_panels(const S* x, int64_t ld, int64_t n, int64_t size_k, int64_t panel_stride, typename Op::Operand* out) {
  for (int64_t k = 0; k < size_k; k += Op::K) {
    const S* row = x + k * ld;
    typename Op::Operand* to = out + k / Op::K * WIDTH;
    const int64_t step = size_k - k > 1 ? ld : 0, left = size_k - k;
    int64_t j = 0;
    for (; j + WIDTH <= n; j += WIDTH, to += panel_stride)
      for (int i = 0; i < WIDTH; ++i) to[i] = Op::at(row + j + i, step, left);
    if (j < n)
      for (int i = 0; i < WIDTH; ++i) to[i] = j + i < n ? Op::at(row + j + i, step, left) : 0;
  }
}

// `count` rows of (size_k) as operands: in place where storage and operand agree, else copied to scratch.
// Two 16-bit values make an operand only where they are bf16: fp16 has no Pair of its own.
template <class Op, class S>
struct Rows {
  const typename Op::Operand* data;
  int64_t stride;
  Rows(const S* x, int64_t ld, int64_t count, int64_t padded, int64_t size_k, typename Op::Operand* scratch) {
    constexpr bool same = sizeof(S) * Op::K == sizeof(typename Op::Operand);
    const bool aligned = reinterpret_cast<std::uintptr_t>(x) % sizeof(typename Op::Operand) == 0;
    if (same && aligned && count == padded && size_k % Op::K == 0 && ld % Op::K == 0) {
      data = reinterpret_cast<const typename Op::Operand*>(x);
      stride = ld / Op::K;
      return;
    }
    const int64_t steps = (size_k + Op::K - 1) / Op::K;
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t k = 0; k < steps; ++k)
        scratch[i * steps + k] = i < count ? Op::at(x + i * ld + k * Op::K, 1, size_k - k * Op::K) : 0;
    data = scratch;
    stride = steps;
  }
};

// ---- the exponential and its sums ------------------------------------------------------------------------------

// Cephes expf: 1 ulp on [-87, 80]; 0 below, held at 80 above (such a row is scored again with another anchor).
inline vfloat vexp(vfloat x) {
  const vfloat high = splat(80.f);
  vfloat d = x > high ? high : x;
  const vfloat magic = splat(12582912.f);
  const vfloat n = (d * 1.44269504f + magic) - magic;
  d = d - n * 0.693359375f;
  d = d + n * 2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * d + 1.3981999507e-3f;
  p = p * d + 8.3334519073e-3f;
  p = p * d + 4.1665795894e-2f;
  p = p * d + 1.6666665459e-1f;
  p = p * d + 5.0000001201e-1f;
  p = p * d * d + d + 1.f;
  // the scale is multiplied in, not added to the exponent: a NaN must stay one
  const vint exponent = (__builtin_convertvector(n, vint) + 127) << 23;
  const vfloat e = p * (vfloat)exponent;
  return x < splat(-87.f) ? vfloat{} : e;
}

// Cephes tanhf.
inline vfloat vtanh(vfloat x) {
  const vfloat s = x * x;
  vfloat p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const vfloat small = x + x * s * p;
  const vfloat large = 1.f - 2.f / (vexp(x + x) + 1.f);
  return s < splat(0.390625f) ? small : large;
}

inline void store_chunk(float* p, vfloat x) { store(p, x); }
inline void store_chunk(uint16_t* p, vfloat x) {
  const vuint u = (vuint)x;
  const vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  *reinterpret_cast<vshort_u*>(p) = __builtin_convertvector(x != x ? (vuint{} + 0x7fc0) : rounded, vshort);
}

// One vector of tokens against `rows` vocabulary rows of raw products c (rows, NR).
template <bool HAS_CAP, class T>
inline void add_rows(const Scoring& s, const float* c, int64_t first_v, int64_t rows, int64_t t, const int32_t* targets,
                     const float* anchor, const float* inv_temperature, const float* c0, const float* c1, double* sums,
                     int64_t ld_sums, T* stored) {
  vint target;
  std::memcpy(&target, targets + t, sizeof target);
  const vfloat a = load(anchor + t), inv_t = load(inv_temperature + t);
  const vfloat k0 = load(c0 + t), k1 = load(c1 + t);
  const float inv_cap = HAS_CAP ? 1.f / s.softcap : 0.f;
  double* out = sums + t;
  auto add_to = [&](Sum which, vfloat x) {
    *reinterpret_cast<vdouble_u*>(out + which * ld_sums) += __builtin_convertvector(x, vdouble);
  };
  // in fp32 over a few rows only: entropy is the difference of two sums, and feels the rounding of both
  vfloat sum{}, sum_d{}, sum_sq{}, sum_z{}, max_d = splat(-__builtin_inff());
  for (int64_t v = 0; v < rows; ++v) {
    vfloat z = (load(c + v * NR) + (s.bias ? s.bias[first_v + v] : 0.f)) * s.logit_scale;
    vfloat slope = splat(1.f);
    if (HAS_CAP) {
      const vfloat th = vtanh(z * inv_cap);
      z = th * s.softcap;
      slope = 1.f - th * th;
    }
    z = z * inv_t;
    const vfloat d = z - a;
    const vint is_label = target == (vint{} + static_cast<int32_t>(first_v + v));
    const vfloat e = is_label ? vfloat{} : vexp(d);
    const vfloat floor = splat(-200.f);  // keeps 0 * inf out of the sums
    const vfloat bounded = d < floor ? floor : d;
    const vfloat ed = is_label ? vfloat{} : e * bounded;
    sum = sum + e;
    sum_d = sum_d + ed;
    sum_sq = sum_sq + e * e;
    sum_z = sum_z + z;
    max_d = is_label ? max_d : (d > max_d ? d : max_d);
    if (stored) store_chunk(stored + (first_v + v) * s.stride + t, slope * (e * k0 + ed * k1));
    if (v % FLUSH == FLUSH - 1 || v == rows - 1) {
      add_to(kSumExp, sum);
      add_to(kSumExpD, sum_d);
      add_to(kSumExpSq, sum_sq);
      add_to(kSumZ, sum_z);
      sum = sum_d = sum_sq = sum_z = vfloat{};
    }
  }
  vdouble_u& highest = *reinterpret_cast<vdouble_u*>(out + kMaxD * ld_sums);
  const vdouble here = __builtin_convertvector(max_d, vdouble);
  highest = here > highest ? here : highest;
}

template <class T>
T* padded_copy(const T* x, int64_t n, int64_t padded, T fill, T* out) {
  for (int64_t i = 0; i < padded; ++i) out[i] = x && i < n ? x[i] : fill;
  return out;
}

template <class Op, class S, class T>
void score(const Scoring& s, int threads) {
  typedef typename Op::Operand Operand;
  const int64_t n = s.n, H = s.hidden_size, V = s.vocab_size, padded = round_up(n, NR);
  const int64_t steps = (H + Op::K - 1) / Op::K, panels = padded / NR, blocks = (V + kVocabBlock - 1) / kVocabBlock;
  Scratch<Operand> x(panels * steps * NR);
  Scratch<float> vectors(4 * padded);
  Scratch<int32_t> targets(padded);
  Scratch<double> partial(blocks * kSums * padded);
  Scratch<Operand> all_rows(threads * MC * steps);
  Scratch<float> all_products(threads * MC * NR);
  const float* anchor = padded_copy(s.anchor, n, padded, __builtin_inff(), vectors.data);
  const float* inv_t = padded_copy(s.inv_temperature, n, padded, 1.f, vectors.data + padded);
  const float* c0 = padded_copy(s.c0, n, padded, 1.f, vectors.data + 2 * padded);
  const float* c1 = padded_copy(s.c1, n, padded, 0.f, vectors.data + 3 * padded);
  for (int64_t i = 0; i < padded; ++i) targets.data[i] = i < n ? static_cast<int32_t>(s.targets[i]) : -1;
  const S* hidden = static_cast<const S*>(s.hidden);
  const S* weight = static_cast<const S*>(s.weight);

#pragma omp parallel num_threads(threads)
  {
    Operand* scratch = all_rows.data + omp_get_thread_num() * MC * steps;
    float* c = all_products.data + omp_get_thread_num() * MC * NR;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) pack_columns<Op>(hidden, H, n, H, p * NR, x.data + p * steps * NR);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      double* sums = partial.data + block * kSums * padded;
      for (int64_t i = 0; i < kSums * padded; ++i) sums[i] = i < kMaxD * padded ? 0.0 : -__builtin_inf();
      const int64_t end = V < (block + 1) * kVocabBlock ? V : (block + 1) * kVocabBlock;
      for (int64_t v = block * kVocabBlock; v < end; v += MC) {
        const int64_t rows = end - v < MC ? end - v : MC, tall = round_up(rows, MR);
        const Rows<Op, S> w(weight + v * s.weight_stride, s.weight_stride, rows, tall, H, scratch);
        for (int64_t p = 0; p < panels; ++p) {
          for (int64_t k = 0; k < steps; k += KC / Op::K) {
            const int64_t count = steps - k < KC / Op::K ? steps - k : KC / Op::K;
            for (int64_t i = 0; i < tall; i += MR)
              tile<Op>(count, w.data + i * w.stride + k, w.stride, 1, x.data + (p * steps + k) * NR, c + i * NR, NR, k > 0);
          }
          for (int j = 0; j < NRV; ++j) {
            auto add = s.softcap > 0 ? add_rows<true, T> : add_rows<false, T>;
            const int64_t t = p * NR + j * VL;
            T* stored = t < s.stride ? static_cast<T*>(s.stored) : nullptr;
            add(s, c + j * VL, v, rows, t, targets.data, anchor, inv_t, c0, c1, sums, padded, stored);
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n; ++t)
      for (int k = 0; k < kSums; ++k) {
        double total = k == kMaxD ? -__builtin_inf() : 0.0;
        for (int64_t block = 0; block < blocks; ++block) {
          const double x = partial.data[(block * kSums + k) * padded + t];
          total = k == kMaxD ? (x > total ? x : total) : total + x;
        }
        s.sums[k * n + t] = total;
      }
  }
}

// ---- the two gradient products ---------------------------------------------------------------------------------

// Copies the corner of a tile that lies inside the output.
inline void add_corner(const float* c, float* out, int64_t ld, int64_t rows, int64_t columns, bool add) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[i * ld + j] = (add ? out[i * ld + j] : 0.f) + c[i * NR + j];
}

template <class Op>
inline void tile_into(int64_t steps, const typename Op::Operand* a, int64_t row, int64_t col, const typename Op::Operand* b,
                      float* out, int64_t ld, int64_t rows, int64_t columns, bool add) {
  if (rows >= MR && columns >= NR) return tile<Op>(steps, a, row, col, b, out, ld, add);
  alignas(64) float c[MR * NR];
  tile<Op>(steps, a, row, col, b, c, NR, false);
  add_corner(c, out, ld, rows < MR ? rows : MR, columns < NR ? columns : NR, add);
}

template <class Op, class S, class T>
void d_hidden(const Product& g, int threads) {
  typedef typename Op::Operand Operand;
  const int64_t n = g.n, H = g.hidden_size, V = g.vocab_size, steps = KC / Op::K;
  const int64_t groups = (n + MR - 1) / MR, panels = (H + NR - 1) / NR;
  Scratch<Operand> f(groups * steps * MR), w(panels * steps * NR);
  const T* stored = static_cast<const T*>(g.stored);
  const S* weight = static_cast<const S*>(g.dense);
  constexpr int64_t SLICE = 32;  // rows of K a thread packs at once

#pragma omp parallel num_threads(threads)
  for (int64_t v = 0; v < V; v += KC) {
    const int64_t size = V - v < KC ? V - v : KC, count = (size + Op::K - 1) / Op::K;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < size; k += SLICE) {
      const int64_t part = size - k < SLICE ? size - k : SLICE;
      pack_panels<Op, MR>(stored + (v + k) * g.stride, g.stride, n, part, steps * MR, f.data + k / Op::K * MR);
      pack_panels<Op, NR>(weight + (v + k) * g.dense_stride, g.dense_stride, H, part, steps * NR, w.data + k / Op::K * NR);
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t group = 0; group < groups; ++group)
        tile_into<Op>(count, f.data + group * steps * MR, 1, MR, w.data + panel * steps * NR,
                      g.out + group * MR * H + panel * NR, H, n - group * MR, H - panel * NR, v > 0);
  }
}

template <class Op, class T>
void d_weight(const Product& g, int threads) {
  typedef typename Op::Operand Operand;
  const int64_t n = g.n, H = g.hidden_size, V = g.vocab_size, steps = (n + Op::K - 1) / Op::K;
  const int64_t panels = (H + NR - 1) / NR;
  Scratch<Operand> x(panels * steps * NR), all_rows(threads * MC * steps);
  const T* stored = static_cast<const T*>(g.stored);
  const float* hidden = static_cast<const float*>(g.dense);

#pragma omp parallel num_threads(threads)
  {
    Operand* scratch = all_rows.data + omp_get_thread_num() * MC * steps;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < n; k += Op::K)
      pack_panels<Op, NR>(hidden + k * H, H, H, n - k < Op::K ? n - k : Op::K, steps * NR, x.data + k / Op::K * NR);
#pragma omp for schedule(dynamic)
    for (int64_t v = 0; v < V; v += MC) {
      const int64_t rows = V - v < MC ? V - v : MC;
      // the chunk's rows are padded with zeros: an odd n reads one of them
      const Rows<Op, T> f(stored + v * g.stride, g.stride, rows, round_up(rows, MR), steps * Op::K, scratch);
      for (int64_t k = 0; k < steps; k += KC / Op::K) {
        const int64_t count = steps - k < KC / Op::K ? steps - k : KC / Op::K;
        for (int64_t panel = 0; panel < panels; ++panel)
          for (int64_t i = 0; i < rows; i += MR)
            tile_into<Op>(count, f.data + i * f.stride + k, f.stride, 1, x.data + (panel * steps + k) * NR,
                          g.out + (v + i) * H + panel * NR, H, rows - i, H - panel * NR, g.accumulate || k > 0);
      }
    }
  }
}

// ---- one entry an operation: storage and operand by dtype ------------------------------------------------------

#ifdef __AVX512BF16__
typedef Pair Half;  // the operand of 16-bit products
#else
typedef Single Half;
#endif

void score_entry(const Scoring& s, Dtype dtype, int threads) {
  switch (dtype) {
    case kFloat32: return score<Single, float, float>(s, threads);
    case kBFloat16: return score<Half, bf16, uint16_t>(s, threads);
    case kFloat16: return score<Single, fp16, uint16_t>(s, threads);  // bf16 would round the inputs
  }
}
void d_hidden_entry(const Product& g, Dtype dtype, int threads) {
  switch (dtype) {
    case kFloat32: return d_hidden<Single, float, float>(g, threads);
    case kBFloat16: return d_hidden<Half, bf16, bf16>(g, threads);
    case kFloat16: return d_hidden<Half, fp16, bf16>(g, threads);
  }
}
void d_weight_entry(const Product& g, Dtype dtype, int threads) {
  switch (dtype) {
    case kFloat32: return d_weight<Single, float>(g, threads);
    case kBFloat16:
    case kFloat16: return d_weight<Half, bf16>(g, threads);
  }
}

}  // namespace

extern const HeadKernels kernels;
const HeadKernels kernels = {score_entry, d_hidden_entry, d_weight_entry};

}  // namespace FP_ISA
}  // namespace fastpref
