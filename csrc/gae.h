// Generalised advantage estimation over rows of (B, T).
//
//   delta_t = r_t + gamma (1 - done_t) V_next - V_t
//   A_t     = delta_t + gamma lam (1 - done_t) A_next       Schulman et al. 2016, arXiv:1506.02438, eq. 16
//   R_t     = A_t + V_t
//
// "next" is the next unmasked step of the row; after the last one, V is bootstrap and A is 0. Masked steps
// are passed over: their reward, value and done are never used, and they get A = R = 0.
#pragma once
#include <cstdint>
#include <string>

namespace fastpref {

struct GaeArgs {
  const float* rewards;         // (B, T)
  const float* values;          // (B, T)
  const std::uint8_t* mask;     // (B, T), nonzero: live; or null: all live
  const std::uint8_t* dones;    // (B, T), nonzero: s_(t+1) is terminal; or null: none
  const float* bootstrap;       // (B,), or null: 0
  float* advantages;            // (B, T), written
  float* returns;               // (B, T), written
  double* sums;                 // (B, 3), written: live steps, and the sums of A and A^2 over them; or null
  std::int64_t n_rows;          // B
  std::int64_t n_steps;         // T
  double gamma;
  double lam;
};

// `isa`: one of isas().
void gae_cpu(const std::string& isa, const GaeArgs& args, int n_threads);

// Asynchronous on `stream` of `device`; null, or the text of the error.
const char* gae_cuda(const GaeArgs& args, int device, void* stream);

}  // namespace fastpref
