// The head's kernels, compiled once for each instruction set (FP_ISA names the namespace); csrc/head.cpp chooses.
//
// One register tile (csrc/head_tile.h) serves three products: MR rows of A, NR packed columns of B.
//   score     C[v, t] = sum_h W[v, h] X[t, h]     rows read in place, X packed once
//   d_weight  C[v, h] = sum_t F[v, t] X'[t, h]    rows read in place, X' packed once
//   d_hidden  C[t, h] = sum_v F[v, t] W[v, h]     both packed, a block of V at a time
// Accumulators start afresh every KC of K (logits of fp32 inputs: KC_FP32), so that fp32 rounding does not grow with H.
// What is not summed in registers is summed in a fixed order: same bits every run.
#include <algorithm>
#include <vector>

#include "head.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

#include "head_pack.h"
#include "head_sums.h"

namespace fastpref {
namespace FP_ISA {
namespace {

constexpr int64_t MC = 96;     // rows a thread keeps close while it walks the columns
constexpr int64_t SLICE = 32;  // rows of K a thread packs at once
static_assert(kVocabBlock % MC == 0 && kTokenPad % VL == 0, "blocks must nest");

struct Share {  // of `count` things, in whole blocks, for this thread of the team
  int64_t first, last;
  Share(int64_t count, int64_t block) {
    const int64_t blocks = (count + block - 1) / block, thread = omp_get_thread_num(), team = omp_get_num_threads();
    first = blocks * thread / team * block;
    last = smaller(blocks * (thread + 1) / team * block, count);
  }
};

template <class T>
T* padded_copy(const T* x, int64_t n, int64_t padded, T fill, T* out) {
  for (int64_t i = 0; i < padded; ++i) out[i] = x && i < n ? x[i] : fill;
  return out;
}

template <class Op, class X, class W, class T>
void score(const Scoring& s, int threads) {
  static_assert(MC % Op::MR == 0, "blocks must nest");
  typedef typename Op::Operand Operand;
  constexpr int64_t MR = Op::MR, NR = Op::NR, KB = Op::K == 1 ? KC_FP32 : KC / Op::K;
  const int64_t n = s.n, H = s.hidden_size, V = s.vocab_size, padded = round_up(n, NR), steps = operands<Op>(H);
  const int64_t panels = padded / NR, whole = round_up(n, VL), blocks = (V + kVocabBlock - 1) / kVocabBlock;
  Scratch<Operand> x(panels * steps * NR);
  Scratch<float> vectors(4 * padded);
  Scratch<int32_t> targets(padded);
  Scratch<double> partial(blocks * kSums * padded);
  Scratch<Operand> all_rows(threads * MC * steps);
  Scratch<float> all_products(threads * MC * NR);
  Tokens tokens;
  tokens.anchor = padded_copy(s.anchor, n, padded, __builtin_inff(), vectors.data);
  tokens.inv_temperature = padded_copy(s.inv_temperature, n, padded, 1.f, vectors.data + padded);
  tokens.c0 = padded_copy(s.c0, n, padded, 1.f, vectors.data + 2 * padded);
  tokens.c1 = padded_copy(s.c1, n, padded, 0.f, vectors.data + 3 * padded);
  for (int64_t i = 0; i < padded; ++i) targets.data[i] = i < n ? static_cast<int32_t>(s.targets[i]) : -1;
  tokens.target = targets.data;
  tokens.n = n;
  tokens.ld_sums = padded;
  const Matrix<X> hidden{static_cast<const X*>(s.hidden), H, 1};
  const Matrix<W> weight{static_cast<const W*>(s.weight), s.weight_stride, s.weight_column};
  T* const stored = static_cast<T*>(s.stored);
  const auto add = s.softcap > 0                       ? add_rows<kCapped, T>
                   : s.bias || s.logit_scale != 1.f ? add_rows<kScaled, T>
                                                       : add_rows<kPlain, T>;

#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const typename Op::Ready ready;
    Operand* scratch = all_rows.data + omp_get_thread_num() * MC * steps;
    float* c = all_products.data + omp_get_thread_num() * MC * NR;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) pack_columns<Op>(hidden, n, H, p * NR, x.data + p * steps * NR);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      Tokens here = tokens;
      here.sums = partial.data + block * kSums * padded;
      for (int64_t i = 0; i < kSums * padded; ++i) here.sums[i] = i < kMaxD * padded ? 0.0 : -__builtin_inf();
      const int64_t end = smaller(V, (block + 1) * kVocabBlock);
      for (int64_t v = block * kVocabBlock; v < end; v += MC) {
        const int64_t rows = smaller(end - v, MC), tall = round_up(rows, MR);
        const Rows<Op, W> w(weight.from(v), rows, tall, H, H, scratch);
        Ahead next(weight.from(v + MC), smaller(V - v - MC, MC), H, panels);
        if (stored && whole < s.stride)
          for (int64_t i = v; i < v + rows; ++i) std::memset(stored + i * s.stride + whole, 0, (s.stride - whole) * sizeof *stored);
        for (int64_t p = 0; p < panels; ++p) {
          next.ask();
          const int64_t wide = (smaller(n - p * NR, NR) + VL - 1) / VL;
          for (int64_t k = 0; k < steps; k += KB)
            for (int64_t i = 0; i < tall; i += MR)
              tile_of<Op>(wide, smaller(steps - k, KB), w.data + i * w.stride + k, w.stride, Op::STEP,
                          x.data + (p * steps + k) * NR, c + i * NR, NR, k > 0);
          for (int64_t j = 0; j < wide * VL; j += VL) {
            const int64_t t = p * NR + j;
            add(s, here, t, c + j, NR, v, rows, stored);
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n; ++t)
      for (int k = 0; k < kSums; ++k) {
        double total = s.add ? s.sums[k * n + t] : k == kMaxD ? -__builtin_inf() : 0.0;
        for (int64_t block = 0; block < blocks; ++block) {
          const double x = partial.data[(block * kSums + k) * padded + t];
          total = k == kMaxD ? (x > total ? x : total) : total + x;
        }
        s.sums[k * n + t] = total;
      }
  }
}

// A tile of which `rows` by `columns` lie inside the output.
template <class Op>
inline void tile_into(int64_t steps, const typename Op::Operand* a, int64_t row, int64_t col, const typename Op::Operand* b,
                      float* out, int64_t ld, int64_t rows, int64_t columns, bool add) {
  constexpr int64_t MR = Op::MR, NR = Op::NR;
  for (int64_t i = 0; i < smaller(rows, MR); ++i)
    for (int64_t j = 0; j < smaller(columns, NR); j += 16) __builtin_prefetch(out + i * ld + j, 1);
  if (rows >= MR && columns >= NR) return Op::tile(steps, a, row, col, b, out, ld, add);
  alignas(64) float c[MR * NR];
  Op::tile(steps, a, row, col, b, c, NR, false);
  for (int64_t i = 0; i < smaller(rows, MR); ++i)
    for (int64_t j = 0; j < smaller(columns, NR); ++j) out[i * ld + j] = (add ? out[i * ld + j] : 0.f) + c[i * NR + j];
}

template <class Op, class W, class T>
void d_hidden(const Product& g, int threads) {
  typedef typename Op::Operand Operand;
  constexpr int64_t MR = Op::MR, NR = Op::NR, KB = KC / Op::K;
  const int64_t n = g.n, H = g.hidden_size, V = g.vocab_size, groups = (n + MR - 1) / MR, panels = (H + NR - 1) / NR;
  Scratch<Operand> f(round_up(groups * MR, VL) * KB), w(panels * KB * NR);
  const Matrix<T> stored{static_cast<const T*>(g.stored), g.stride, 1};
  const Matrix<W> weight{static_cast<const W*>(g.dense), g.dense_stride, g.dense_column};

#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const typename Op::Ready ready;
    const Share tiles(panels * groups, 1), rows(KC, SLICE);
    for (int64_t v = 0; v < V; v += KC) {
      const int64_t size = smaller(V - v, KC), steps = operands<Op>(size);
      for (int64_t k = rows.first; k < smaller(rows.last, size); k += SLICE) {
        const int64_t part = smaller(size - k, SLICE);
        pack_groups<Op>(stored.from(v + k), n, part, KB * MR, f.data + k / Op::K * MR);
        pack_panels<Op, NR>(weight.from(v + k), H, part, KB * NR, w.data + k / Op::K * NR);
      }
#pragma omp barrier
      const int64_t next = v + KC + rows.first, count = smaller(V - next, rows.last - rows.first);
      Ahead next_stored(stored.from(next), count, n, tiles.last - tiles.first);
      Ahead next_weight(weight.from(next), count, H, tiles.last - tiles.first);
      for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
        const int64_t panel = tile / groups, group = tile % groups;
        next_stored.ask();
        next_weight.ask();
        tile_into<Op>(steps, f.data + group * KB * MR, Op::GROUP_ROW, Op::GROUP_COL, w.data + panel * KB * NR,
                      g.out + group * MR * H + panel * NR, H, n - group * MR, H - panel * NR, g.accumulate || v > 0);
      }
#pragma omp barrier
    }
  }
}

// The label's terms of a d_weight that is rounded, by row of the weight.
template <class X>
struct Labels {
  const Product& g;
  std::vector<int64_t> order;
  explicit Labels(const Product& g) : g(g), order(g.rounded ? g.n : 0) {
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return g.targets[a] < g.targets[b]; });
  }
  // to `rows` rows of the product from row v on; then rounds them
  void finish(float* c, int64_t v, int64_t rows) const {
    const int64_t H = g.hidden_size;
    auto at = std::lower_bound(order.begin(), order.end(), v, [&](int64_t t, int64_t row) { return g.targets[t] < row; });
    for (; at != order.end() && g.targets[*at] < v + rows; ++at) {
      const X* x = static_cast<const X*>(g.hidden) + *at * H;
      float* const row = c + (g.targets[*at] - v) * H;
      for (int64_t i = 0; i < H; ++i) row[i] += g.label[*at] * to_float(x[i]);
    }
    X* const out = static_cast<X*>(g.rounded) + v * H;
    int64_t i = 0;
    for (; i + VL <= rows * H; i += VL) store(out + i, load(c + i));
    float rest[VL] = {};
    X rounded[VL];
    std::memcpy(rest, c + i, (rows * H - i) * sizeof *c);
    store(rounded, load(rest));
    std::memcpy(out + i, rounded, (rows * H - i) * sizeof *out);
  }
};

template <class Op, class T, class X>
void d_weight(const Product& g, int threads) {
  typedef typename Op::Operand Operand;
  constexpr int64_t MR = Op::MR, NR = Op::NR, KB = KC / Op::K;
  const int64_t n = g.n, H = g.hidden_size, V = g.vocab_size, steps = operands<Op>(n), panels = (H + NR - 1) / NR;
  Scratch<Operand> x(panels * steps * NR), all_rows(threads * MC * steps);
  Scratch<float> all_products(g.rounded ? threads * MC * H : 0);
  const Labels<X> labels(g);
  const Matrix<T> stored{static_cast<const T*>(g.stored), g.stride, 1};
  const Matrix<float> hidden{static_cast<const float*>(g.dense), H, 1};

#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const typename Op::Ready ready;
    Operand* scratch = all_rows.data + omp_get_thread_num() * MC * steps;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < n; k += SLICE)
      pack_panels<Op, NR>(hidden.from(k), H, smaller(n - k, SLICE), steps * NR, x.data + k / Op::K * NR);
#pragma omp for schedule(dynamic)
    for (int64_t v = 0; v < V; v += MC) {
      const int64_t rows = smaller(V - v, MC);
      float* const out = g.rounded ? all_products.data + omp_get_thread_num() * MC * H : g.out + v * H;
      const Rows<Op, T> f(stored.from(v), rows, round_up(rows, MR), n, g.stride, scratch);
      Ahead next(stored.from(v + MC), smaller(V - v - MC, MC), n, panels);
      for (int64_t panel = 0; panel < panels; ++panel) {
        next.ask();
        // once at least: without a token the product is 0
        for (int64_t k = 0; k == 0 || k < steps; k += KB)
          for (int64_t i = 0; i < rows; i += MR)
            tile_into<Op>(smaller(steps - k, KB), f.data + i * f.stride + k, f.stride, Op::STEP, x.data + (panel * steps + k) * NR,
                          out + i * H + panel * NR, H, rows - i, H - panel * NR, g.accumulate || k > 0);
      }
      if (g.rounded) labels.finish(out, v, rows);
    }
  }
}

// the operand of 16-bit products
#if defined(FP_AMX)
typedef Tiles Half;
#elif defined(__AVX512BF16__)
typedef Pair Half;
#else
typedef Single Half;
#endif

void score_entry(const Scoring& s, Dtype dtype, int threads) {
  switch (dtype) {
    case kFloat32: return score<Single, float, float, float>(s, threads);
    case kBFloat16:
      return s.weight_fp32 ? score<Half, bf16, AsBf16, uint16_t>(s, threads) : score<Half, bf16, bf16, uint16_t>(s, threads);
    case kFloat16:  // bf16 operands would round the inputs
      return s.weight_fp32 ? score<Single, fp16, AsFp16, uint16_t>(s, threads) : score<Single, fp16, fp16, uint16_t>(s, threads);
  }
}
void d_hidden_entry(const Product& g, Dtype dtype, int threads) {
  switch (dtype) {
    case kFloat32: return d_hidden<Single, float, float>(g, threads);
    case kBFloat16: return g.dense_fp32 ? d_hidden<Half, AsBf16, bf16>(g, threads) : d_hidden<Half, bf16, bf16>(g, threads);
    case kFloat16: return g.dense_fp32 ? d_hidden<Half, AsFp16, bf16>(g, threads) : d_hidden<Half, fp16, bf16>(g, threads);
  }
}
void d_weight_entry(const Product& g, Dtype dtype, int threads) {
  switch (dtype) {
    case kFloat32: return d_weight<Single, float, float>(g, threads);
    case kBFloat16: return d_weight<Half, bf16, bf16>(g, threads);
    case kFloat16: return d_weight<Half, bf16, fp16>(g, threads);
  }
}

}  // namespace

extern const HeadKernels kernels;
const HeadKernels kernels = {score_entry, d_hidden_entry, d_weight_entry};

}  // namespace FP_ISA
}  // namespace fastpref
