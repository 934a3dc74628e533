// Log-probabilities and their kin of rows of logits u that already exist, and the gradient.
//
//   z = softcap tanh(logit_scale u / softcap) / T,  d_v = z_v - anchor,  e_v = exp(d_v),  S = sum_v e_v
//   logp = z_y - anchor - log S,  entropy = log S - (1/S) sum e_v d_v
//   dL/dz_v = g 1[v = y] - p_v (g + h (log p_v + entropy)),  p_v = exp(log p_v),  g = dL/dlogp,  h = dL/dentropy
//
// The anchor is the label's own logit, so that a confident row keeps full precision, until logits well above it move it
// up. A row is read once forward; backward it is read once and written once, which may be in place.
#pragma once
#include <cstdint>
#include <string>

#include "head.h"

namespace fastpref {

struct Logits {
  const void* logits;            // (M, V), rows `stride` apart
  const int64_t* targets;        // (M,)
  const uint8_t* live;           // (M,) 0: the row is not read
  const float* inv_temperature;  // (M,)
  int64_t n, vocab_size, stride;
  float logit_scale, softcap;    // softcap 0: none
};

struct TokenOutputs {  // (M,) each, written where live
  float *logps, *entropy, *log_sum_sq_probs, *mean_logits;
  uint8_t* is_top1;
  float *anchor, *total;  // S: what backward needs of the row
};

struct TokenGradients {
  const float *grad_logps, *grad_entropy;  // (M,); the latter may be null
  const float *logps, *entropy, *anchor, *total;  // (M,) as they were written
  void* d_logits;                          // (M, V), all written, 0 where not live; may be `logits`
};

struct SelectiveKernels {
  void (*forward)(const Logits&, const TokenOutputs&, Dtype, int threads);
  void (*backward)(const Logits&, const TokenGradients&, Dtype, int threads);
};

// `isa`: one of isas().
const SelectiveKernels& selective_kernels(const std::string& isa);

}  // namespace fastpref
