// Losses, slopes, rewards and metrics of preference pairs in one launch.
//
// Bytes: 16 read and 20 written a pair (ipo: 32 and 20). A batch has some dozens of pairs, so what counts is the one
// launch in place of some forty; one block takes them all, and the metrics are sums in a fixed order.
#include "dpo_row.h"

#include "launch.cuh"

namespace fastpref {
namespace {

constexpr int THREADS = 256;

struct Graded {
  float loss, d_chosen, d_rejected;
};

__device__ __forceinline__ float log_sigmoid(float z) { return (z < 0.0f ? z : 0.0f) - log1pf(expf(-fabsf(z))); }

__device__ __forceinline__ float sigmoid(float z) {
  const float small = expf(-fabsf(z));  // never overflows
  return (z < 0.0f ? small : 1.0f) / (1.0f + small);
}

__device__ __forceinline__ Graded grade(const DpoRowArgs& args, float chosen, float rejected, std::int64_t i) {
  const float beta = args.beta, e = args.smoothing;
  if (args.loss == kIpo) {
    const float of_chosen = static_cast<float>(args.chosen_lengths[i] > 1 ? args.chosen_lengths[i] : 1);
    const float of_rejected = static_cast<float>(args.rejected_lengths[i] > 1 ? args.rejected_lengths[i] : 1);
    const float off = chosen / of_chosen - rejected / of_rejected - 1.0f / (2.0f * beta);
    return {off * off, 2.0f * off / of_chosen, -2.0f * off / of_rejected};
  }
  const float z = beta * (chosen - rejected);
  float loss, slope;  // d loss / d z
  if (args.loss == kHinge) {
    loss = z < 1.0f ? 1.0f - z : 0.0f * z;  // a NaN stays one
    slope = z < 1.0f ? -1.0f : 0.0f;
  } else {
    const float sign = args.loss == kRobust ? -1.0f : 1.0f, scale = args.loss == kRobust ? 1.0f / (1.0f - 2.0f * e) : 1.0f;
    loss = -scale * ((1.0f - e) * log_sigmoid(z) + sign * e * log_sigmoid(-z));
    slope = -scale * ((1.0f - e) * sigmoid(-z) - sign * e * sigmoid(z));
  }
  return {loss, beta * slope, -beta * slope};
}

__global__ void __launch_bounds__(THREADS) dpo_row_kernel(DpoRowArgs args) {
  double sums[kPairMetrics] = {};
  for (std::int64_t i = threadIdx.x; i < args.n_pairs; i += THREADS) {
    const float chosen = args.chosen[i], rejected = args.rejected[i];
    const float of_chosen = chosen - args.ref_chosen[i], of_rejected = rejected - args.ref_rejected[i];

    const Graded pair = grade(args, of_chosen, of_rejected, i);
    const float chosen_reward = args.beta * of_chosen, rejected_reward = args.beta * of_rejected;

    args.losses[i] = args.weight * pair.loss;
    args.chosen_slopes[i] = args.weight * pair.d_chosen;
    args.rejected_slopes[i] = args.weight * pair.d_rejected;
    args.chosen_rewards[i] = chosen_reward;
    args.rejected_rewards[i] = rejected_reward;
    sums[0] += chosen_reward;
    sums[1] += rejected_reward;
    sums[2] += chosen_reward > rejected_reward;
    sums[3] += chosen_reward - rejected_reward;
    sums[4] += chosen;
    sums[5] += rejected;
  }
  sum_over_block<THREADS>(sums);
  if (threadIdx.x == 0)
    for (int k = 0; k < kPairMetrics; ++k)
      args.metrics[k] = static_cast<float>(sums[k] / static_cast<double>(args.n_pairs > 0 ? args.n_pairs : 1));
}

}  // namespace

const char* dpo_row_cuda(const DpoRowArgs& args, int device, void* stream) {
  return launch(dpo_row_kernel, 1, THREADS, device, stream, args);
}

}  // namespace fastpref
