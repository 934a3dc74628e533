// The clipped policy loss of tokens: with r = pi / pi_old and A the advantage, c the token's share of the loss
//
//   s    = -min(r A, clip(r, low, high) A), and where A < 0 and r > delta: -delta A
//   loss = c (weight w s + kl_coef kl - entropy_coef H)
//   kl   : k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l,  l = log pi - log ref
//
// Schulman et al. 2017, arXiv:1707.06347, eq. 7; Ye et al. 2020, arXiv:1912.09729 (delta); Schulman 2020, "Approximating
// KL divergence". Beyond 20 nats exp goes on as its tangent. They repeat fastpref/losses/surrogates.py, kl.py and
// objective.py, where they are right.
#pragma once
#include <cstdint>

namespace fastpref {

enum KlEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2 };

// clip_ratio/low_mean, low_min, high_mean, high_max, region_mean; policy/approxkl_avg, kl, entropy
constexpr int kTokenMetrics = 8;
// of some tokens of a sequence: how many are live, cut off below, above; sums of (log r)^2, kl and H
constexpr int kTokenSums = 6;

struct PpoRowArgs {
  const float* logps;           // (N,) under the policy, nats
  const float* old_logps;       // (N,) under the one that sampled; null: logps
  const float* advantages;      // (N,)
  const float* shares;          // (N,) c
  const float* token_weights;   // (N,) w; null: 1
  const float* ref_logps;       // (N,) under the reference; null: no KL
  const float* entropy;         // (N,) H; null: none
  const std::uint8_t* mask;     // (N,) nonzero: live; where it is 0 nothing else is used
  const std::int64_t* bounds;   // (S + 1,) where each sequence starts, and the end; null: no metrics
  float* losses;                // (N,) written, as are all that follow
  float* d_logps;               // (N,) d loss / d log pi
  float* d_entropy;             // (N,) d loss / d H; null without entropy
  double* sums;                 // (S, ppo_row_parts, kTokenSums), or null without bounds
  float* metrics;               // (kTokenMetrics,), or null without bounds
  std::int64_t n_tokens;        // N
  std::int64_t n_sequences;     // S
  float low, high;              // of the clip range
  float delta;                  // infinity: none
  float weight;
  float kl_coef;
  int kl;  // a KlEstimator
  float entropy_coef;
};

// Blocks that share the tokens of a sequence.
std::int64_t ppo_row_parts(std::int64_t n_tokens, std::int64_t n_sequences);

// Asynchronous on `stream` of `device`; null, or the text of the error.
const char* ppo_row_cuda(const PpoRowArgs& args, int device, void* stream);

}  // namespace fastpref
