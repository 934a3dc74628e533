// Losses of preference pairs from sums of log-probs: with r_w, r_l the log-ratios to the reference, z = beta (r_w - r_l)
//
//   sigmoid   -(1 - e) log sigmoid(z) - e log sigmoid(-z)                   Rafailov et al. 2023, arXiv:2305.18290, eq. 7
//   robust    (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)     Chowdhury et al. 2024, arXiv:2403.00409
//   hinge     max(0, 1 - z)                                                 Zhao et al. 2023, arXiv:2305.10425, eq. 2
//   ipo       (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2                  Azar et al. 2023, arXiv:2310.12036, eq. 17
//
// They repeat fastpref/losses/preference.py, where they are right.
#pragma once
#include <cstdint>

namespace fastpref {

enum PairLoss : int { kSigmoid = 0, kRobust = 1, kHinge = 2, kIpo = 3 };

// rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected
constexpr int kPairMetrics = 6;

struct DpoRowArgs {
  const float* chosen;                   // (B,) sums of log-probs under the policy, nats
  const float* rejected;                 // (B,)
  const float* ref_chosen;               // (B,) under the reference
  const float* ref_rejected;             // (B,)
  const std::int64_t* chosen_lengths;    // (B,) tokens; ipo alone reads them
  const std::int64_t* rejected_lengths;  // (B,)
  float* losses;                         // (B,) written, as are all that follow; times weight
  float* chosen_slopes;                  // (B,) d loss / d chosen
  float* rejected_slopes;                // (B,) d loss / d rejected
  float* chosen_rewards;                 // (B,) beta r_w
  float* rejected_rewards;               // (B,) beta r_l
  float* metrics;                        // (kPairMetrics,) means over the pairs; 0 where there are none
  std::int64_t n_pairs;                  // B
  int loss;                              // a PairLoss
  float beta;
  float smoothing;  // e
  float weight;
};

// Asynchronous on `stream` of `device`; null, or the text of the error.
const char* dpo_row_cuda(const DpoRowArgs& args, int device, void* stream);

}  // namespace fastpref
