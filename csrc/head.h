// The linear head on the CPU: what the kernels of every instruction set share.
//
//   u = logit_scale (x . w + bias),  z = softcap tanh(u / softcap) / T,  d_v = z_v - anchor,  e_v = exp(d_v)
//
// `score` is the one pass over the vocabulary: sums of e over v != y in a fixed order, of 8 rows in fp32 and of those in
// fp64, and, if asked for, the stored chunk F_v = e_v (1 - tanh^2) (c0 + c1 d_v), label entry zero. `d_hidden` and
// `d_weight` are the two gradient products on that chunk; fastpref/kernels/head.py has the mathematics.
#pragma once
#include <cstdint>

namespace fastpref {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The chunk is (V, stride) with tokens contiguous; the stride is a multiple of this, and what lies past n is zero.
constexpr int64_t kTokenPad = 16;
// Sums are formed within this many vocabulary rows, then added in index order.
constexpr int64_t kVocabBlock = 480;

enum Sum : int { kSumExp = 0, kSumExpD = 1, kSumExpSq = 2, kSumZ = 3, kMaxD = 4, kSums = 5 };

struct Scoring {
  const void* hidden;            // (n, H) contiguous
  const void* weight;            // (V, H), rows weight_stride apart, columns weight_column
  const float* bias;             // (V,) or null
  const int64_t* targets;        // (n,), in [0, V), or -1: no label among these rows of the weight
  const float* anchor;           // (n,) subtracted from every z of the row
  const float* inv_temperature;  // (n,)
  const float* c0;               // (n,) or null: the stored chunk is F (c0 + c1 d)
  const float* c1;               // (n,) or null
  double* sums;                  // (kSums, n) written, or added to; the label's entry is left out of all but kSumZ
  void* stored;                  // (V, stride) or null; bf16, or fp32 for fp32 inputs
  int64_t n, hidden_size, vocab_size, weight_stride, stride;
  float logit_scale, softcap;    // softcap 0: none
  int64_t weight_column = 1;
  bool weight_fp32 = false;      // of 16-bit hidden: the weight is rounded to its dtype as it is read
  bool add = false;              // sums holds those of the vocabulary rows before these, which are whole blocks
};

struct Product {
  const void* stored;  // (V, stride), as `score` left it
  const void* dense;   // d_hidden: weight (V, H), rows dense_stride apart, columns dense_column. d_weight: (n, H)
                       // fp32 scaled hidden, contiguous
  float* out;          // d_hidden: (n, H); d_weight: (V, H); added to if accumulate
  int64_t n, hidden_size, vocab_size, dense_stride, stride;
  bool accumulate;
  int64_t dense_column = 1;
  bool dense_fp32 = false;  // d_hidden of 16-bit hidden: the weight is rounded to its dtype as it is read
  // d_weight of 16-bit hidden, all or none; not with accumulate: label[t] hidden[t] is added to row targets[t], if there
  // is one, and the sum is rounded once
  void* rounded = nullptr;           // (V, H) in hidden's dtype, written; `out` is then not used
  const void* hidden = nullptr;      // (n, H) contiguous
  const float* label = nullptr;      // (n,)
  const int64_t* targets = nullptr;  // (n,)
};

struct HeadKernels {
  void (*score)(const Scoring&, Dtype, int threads);
  void (*d_hidden)(const Product&, Dtype, int threads);
  void (*d_weight)(const Product&, Dtype, int threads);
};

}  // namespace fastpref
