// Brings matrices of any stride and storage type into the layouts of the register tiles. Included by head_isa.cpp alone.
#pragma once
#include <cstdlib>
#include <new>
#include <type_traits>

#include "head_tile.h"

namespace fastpref {
namespace FP_ISA {
namespace {

constexpr int64_t KC = 256;  // of K between two fresh accumulators
constexpr int64_t KC_FP32 = 64;  // the same of logits of fp32 inputs, which the products' own rounding would dominate

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// operands that a row of `size_k` becomes, with the zeros behind it
template <class Op>
int64_t operands(int64_t size_k) { return round_up(size_k, Op::K * Op::STEP) / Op::K; }

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

// `count` operands along K from the `left` values at p, `column` apart; zeros behind them.
template <class Op, class S, class Column>
inline __attribute__((always_inline)) void pack_along(const S* p, Column column, int64_t left, int64_t count, typename Op::Operand* out, int64_t spacing) {
  const int64_t whole = smaller(left > 0 ? left / Op::K : 0, count);
  int64_t k = 0;
  for (; k < whole; ++k) {
    if constexpr (Op::K == 2) out[k * spacing] = Op::join(p[2 * k * column], p[(2 * k + 1) * column]);
    else out[k * spacing] = Op::join(p[k * column]);
  }
  if constexpr (Op::K == 2)
    if (k < count && 2 * k < left) {
      out[k * spacing] = Op::join(p[2 * k * column], S{});
      ++k;
    }
  for (; k < count; ++k) out[k * spacing] = 0;
}

// Rows [first, first + NR) of n, K along a row, as the columns of B: (steps, NR); zero past n.
template <class Op, class S>
void pack_columns(Matrix<S> x, int64_t n, int64_t size_k, int64_t first, typename Op::Operand* out) {
  constexpr int64_t BLOCK = 16;  // operands of a row at once: what is written stays in the first cache
  const int64_t steps = operands<Op>(size_k);
  for (int64_t k = 0; k < steps; k += BLOCK) {
    const int64_t count = smaller(steps - k, BLOCK);
    for (int64_t j = 0; j < Op::NR; ++j) {
      const bool inside = first + j < n;
      with_column(x.column, [&](auto column) {
        pack_along<Op>(inside ? x.at(first + j, k * Op::K) : nullptr, column, inside ? size_k - k * Op::K : 0, count,
                       out + k * Op::NR + j, Op::NR);
      });
    }
  }
}

// One operand of each of `count` columns, from the row at p and, of a pair, from the one at q (null: zeros).
template <class Op, class S, class Column>
inline __attribute__((always_inline)) void pack_across(const S* p, const S* q, Column column, int64_t count,
                                                       typename Op::Operand* out) {
  if constexpr (Op::K == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = Op::join(p[i * column]);
  } else if (!q) {
    for (int64_t i = 0; i < count; ++i) out[i] = Op::join(p[i * column], S{});
  } else {
    int64_t i = 0;
    if constexpr (std::is_same_v<S, bf16> && std::is_class_v<Column>) {
      auto wide = [](const bf16* x) { return __builtin_convertvector(*reinterpret_cast<const vshort_u*>(x), vuint); };
      for (; i + VL <= count; i += VL) {
        const vuint pairs = wide(p + i) | wide(q + i) << 16;
        std::memcpy(out + i, &pairs, sizeof pairs);
      }
    }
    for (; i < count; ++i) out[i] = Op::join(p[i * column], q[i * column]);
  }
}

// Columns of a source with K along its columns, as panels (n / WIDTH, steps, WIDTH), `panel_stride` apart; zero past n
// and past size_k.
template <class Op, int WIDTH, class S>
void pack_panels(Matrix<S> x, int64_t n, int64_t size_k, int64_t panel_stride, typename Op::Operand* out) {
  // a cache line of each row at once: what is written stays in the first cache
  constexpr int64_t COLUMNS = WIDTH >= 32 ? WIDTH : 32 / WIDTH * WIDTH;
  const int64_t steps = operands<Op>(size_k);
  for (int64_t j = 0; j < n; j += COLUMNS) {
    const int64_t count = smaller(n - j, COLUMNS);
    for (int64_t k = 0; k < steps; ++k) {
      typename Op::Operand line[COLUMNS];
      const int64_t row = k * Op::K;
      if (count < COLUMNS || row >= size_k) std::memset(line, 0, sizeof line);
      if (row < size_k) {
        const S *p = x.at(row, j), *q = Op::K == 2 && row + 1 < size_k ? p + x.row : nullptr;
        with_column(x.column, [&](auto column) {
          if (count == COLUMNS) pack_across<Op>(p, q, column, COLUMNS, line);
          else pack_across<Op>(p, q, column, count, line);
        });
      }
      for (int64_t i = 0; i < count; i += WIDTH)
        std::memcpy(out + (j + i) / WIDTH * panel_stride + k * WIDTH, line + i, WIDTH * sizeof *line);
    }
  }
}

#ifdef __AVX512BF16__
inline void transpose(__m512i (&rows)[16]) {
  __m512i x[16];
  for (int i = 0; i < 16; i += 2) {
    x[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    x[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(x[i + j], x[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(x[i + j], x[i + j + 2]);
    }
  // rows[4 a + b] now holds, in its quarter c, the entries 4 a .. 4 a + 3 of column 4 c + b
  for (int b = 0; b < 4; ++b) {
    const __m512i low = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x88), high = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xdd);
    x[b] = _mm512_shuffle_i32x4(low, high, 0x88);
    x[8 + b] = _mm512_shuffle_i32x4(low, high, 0xdd);
    x[4 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    x[12 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = x[i];
}
#endif

// The rows of A from a stored chunk, K along its columns: groups (n / MR) of MR tokens, `group_stride` apart. A group is
// (steps, MR), and for AMX, transposed, (steps / 16, MR, 16). Room for whole vectors of tokens is needed.
template <class Op, class T>
void pack_groups(Matrix<T> x, int64_t n, int64_t size_k, int64_t group_stride, typename Op::Operand* out) {
  if constexpr (Op::K == 1) {
    pack_panels<Op, Op::MR>(x, n, size_k, group_stride, out);
  } else {
#ifdef __AVX512BF16__
    constexpr int64_t MR = Op::MR;
    for (int64_t j = 0; j < round_up(n, Op::STEP == 1 ? VL : MR); j += VL)
      for (int64_t k = 0; k < operands<Op>(size_k); k += 16) {
        // a chunk's rows are padded to whole vectors of tokens
        auto tokens = [&](int64_t row) {
          const bool inside = row < size_k && j < n;
          return inside ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.at(row, j)))) : _mm512_setzero_si512();
        };
        __m512i pairs[16];
        for (int64_t i = 0; i < 16; ++i)
          pairs[i] = _mm512_or_si512(tokens(2 * (k + i)), _mm512_slli_epi32(tokens(2 * (k + i) + 1), 16));
        typename Op::Operand* to = out + j / MR * group_stride + k / Op::STEP * Op::GROUP_COL + j % MR * Op::GROUP_ROW;
        if constexpr (Op::STEP == 1) {
          for (int64_t i = 0; i < 16; ++i)
            for (int64_t group = 0; group < VL / MR; ++group)
              std::memcpy(to + group * group_stride + i * MR, reinterpret_cast<const char*>(&pairs[i]) + group * MR * 4, MR * 4);
        } else {
          transpose(pairs);
          for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * Op::GROUP_ROW, pairs[i]);
        }
      }
#endif
  }
}

// `count` rows of (size_k) as the rows of A, `padded` of them: in place where storage and operand agree and the zeros
// that the tile reads are there, up to `readable` values of a row; else copied to scratch.
template <class Op, class S>
struct Rows {
  typedef typename Op::Operand Operand;
  static constexpr bool SAME = Op::K == 2 ? std::is_same_v<S, bf16> : std::is_same_v<S, float>;
  const Operand* data;
  int64_t stride;
  Rows(Matrix<S> x, int64_t count, int64_t padded, int64_t size_k, int64_t readable, Operand* scratch) {
    const int64_t steps = operands<Op>(size_k);
    const bool aligned = reinterpret_cast<std::uintptr_t>(x.data) % sizeof(Operand) == 0 && x.row % Op::K == 0;
    if (SAME && aligned && x.column == 1 && count == padded && steps * Op::K <= readable) {
      data = reinterpret_cast<const Operand*>(x.data);
      stride = x.row / Op::K;
      return;
    }
    for (int64_t i = 0; i < padded; ++i)
      with_column(x.column, [&](auto column) {
        pack_along<Op>(i < count ? x.at(i, 0) : nullptr, column, i < count ? size_k : 0, steps, scratch + i * steps, 1);
      });
    data = scratch;
    stride = steps;
  }
};

// Asks for rows that are wanted next, a part of them at each of `times` calls: memory works while the caller computes.
struct Ahead {
  const char* row;
  int64_t row_bytes, stride, rows, offset = 0, lines;
  template <class S>
  Ahead(Matrix<S> x, int64_t count, int64_t size, int64_t times)
      : row(reinterpret_cast<const char*>(x.data)), row_bytes(size * sizeof(S)), stride(x.row * sizeof(S)),
        rows(x.column == 1 ? count : 0) {
    const int64_t row_lines = (row_bytes + 63) / 64;
    lines = rows > 0 && times > 0 ? (rows * row_lines + times - 1) / times : 0;
  }
  void ask() {
    for (int64_t i = 0; i < lines && rows > 0; ++i) {
      __builtin_prefetch(row + offset, 0, 2);
      offset += 64;
      if (offset < row_bytes) continue;
      offset = 0;
      row += stride;
      --rows;
    }
  }
};

}  // namespace
}  // namespace FP_ISA
}  // namespace fastpref
