// Losses, slopes and metrics of tokens under the clipped policy loss: one launch over the tokens, and one more, of a
// single warp, that brings the sums of sequences together.
//
// Bytes: a token costs 17 read and 8 written, 29 and 12 with a reference, weights and an entropy: 0.3 MB for 8,192 tokens,
// nothing beside the launches, of which eager PyTorch needs some sixty.
#include "ppo_row.h"

#include <algorithm>

#include "launch.cuh"

namespace fastpref {
namespace {

constexpr int THREADS = 256;
constexpr float LIMIT = 20.0f;  // nats, of fastpref/losses/kl.py

struct Exponential {  // exp up to LIMIT, its tangent beyond
  float value, slope;
};

__device__ __forceinline__ Exponential bounded_exp(float x) {
  const float capped = x > LIMIT ? LIMIT : x;  // not fminf: a NaN stays one
  const float slope = expf(capped);
  return {slope * (1.0f + (x - capped)), slope};
}

struct Graded {
  float value, slope;
};

__device__ __forceinline__ Graded divergence(int kl, float log_ratio) {
  if (kl == kK1) return {log_ratio, 1.0f};
  if (kl == kK2) return {0.5f * log_ratio * log_ratio, log_ratio};
  const float capped = -log_ratio > LIMIT ? LIMIT : -log_ratio, less_one = expm1f(capped);
  // expm1: near 0 the terms cancel
  return {less_one + (less_one + 1.0f) * (-log_ratio - capped) + log_ratio, -less_one};
}

__device__ __forceinline__ Graded surrogate(const PpoRowArgs& args, Exponential ratio, float advantage) {
  if (advantage < 0.0f && ratio.value > args.delta) return {-args.delta * advantage, 0.0f};
  const float inside = ratio.value < args.low ? args.low : ratio.value > args.high ? args.high : ratio.value;
  const float clipped = inside * advantage, unclipped = ratio.value * advantage;
  // equal inside the clip range, where the gradient flows
  if (clipped < unclipped) return {-clipped, 0.0f};
  return {-unclipped, -ratio.slope * advantage};
}

// With bounds, `parts` blocks a sequence; without, all tokens are one sequence.
struct Call {
  PpoRowArgs args;
  std::int64_t parts;
};

__global__ void __launch_bounds__(THREADS) ppo_row_kernel(Call call) {
  const PpoRowArgs& args = call.args;
  const std::int64_t sequence = blockIdx.x / call.parts, part = blockIdx.x % call.parts;
  std::int64_t first = 0, last = args.n_tokens;
  if (args.bounds) {  // not checked on the host: whatever they are, nothing outside the tensors is touched
    first = args.bounds[sequence] > 0 ? args.bounds[sequence] : 0;
    if (args.bounds[sequence + 1] < last) last = args.bounds[sequence + 1];
  }

  double sums[kTokenSums] = {};
  for (std::int64_t i = first + part * THREADS + threadIdx.x; i < last; i += call.parts * THREADS) {
    float loss = 0.0f, d_logp = 0.0f, d_entropy = 0.0f;
    if (args.mask[i]) {
      const float logp = args.logps[i], advantage = args.advantages[i], share = args.shares[i];
      const float log_ratio = args.old_logps ? logp - args.old_logps[i] : 0.0f;

      const Exponential ratio = bounded_exp(log_ratio);
      const Graded s = surrogate(args, ratio, advantage);
      const float weight = args.token_weights ? args.weight * args.token_weights[i] : args.weight;
      loss = weight * s.value;
      d_logp = weight * s.slope;
      sums[0] += 1;
      sums[1] += ratio.value < args.low && advantage < 0.0f;
      sums[2] += ratio.value > args.high && advantage > 0.0f;
      sums[3] += static_cast<double>(log_ratio) * log_ratio;
      if (args.ref_logps) {
        const Graded kl = divergence(args.kl, logp - args.ref_logps[i]);
        loss += args.kl_coef * kl.value;
        d_logp += args.kl_coef * kl.slope;
        sums[4] += kl.value;
      }
      if (args.entropy) {
        const float entropy = args.entropy[i];
        loss -= args.entropy_coef * entropy;
        d_entropy = -args.entropy_coef * share;
        sums[5] += entropy;
      }
      loss *= share;
      d_logp *= share;
    }
    args.losses[i] = loss;
    args.d_logps[i] = d_logp;
    if (args.d_entropy) args.d_entropy[i] = d_entropy;
  }
  if (!args.bounds) return;
  sum_over_block<THREADS>(sums);
  if (threadIdx.x == 0)
    for (int k = 0; k < kTokenSums; ++k) args.sums[blockIdx.x * static_cast<std::int64_t>(kTokenSums) + k] = sums[k];
}

// One warp.
__global__ void __launch_bounds__(WARP) ppo_metrics_kernel(Call call) {
  const PpoRowArgs& args = call.args;
  double sums[kTokenSums] = {};
  float least = 1.0f, most = 0.0f;
  for (std::int64_t sequence = threadIdx.x; sequence < args.n_sequences; sequence += WARP) {
    double of_sequence[kTokenSums] = {};
    for (std::int64_t part = 0; part < call.parts; ++part)
      for (int k = 0; k < kTokenSums; ++k) of_sequence[k] += args.sums[(sequence * call.parts + part) * kTokenSums + k];
    for (int k = 0; k < kTokenSums; ++k) sums[k] += of_sequence[k];
    if (of_sequence[0] > 0) {
      const float length = static_cast<float>(of_sequence[0]);
      least = fminf(least, static_cast<float>(of_sequence[1]) / length);
      most = fmaxf(most, static_cast<float>(of_sequence[2]) / length);
    }
  }
#pragma unroll
  for (int distance = WARP / 2; distance; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kTokenSums; ++k) sums[k] += __shfl_xor_sync(ALL_LANES, sums[k], distance);
    least = fminf(least, __shfl_xor_sync(ALL_LANES, least, distance));
    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, distance));
  }
  if (threadIdx.x) return;
  const double count = sums[0] > 0 ? sums[0] : 1;
  const double found[kTokenMetrics] = {sums[1] / count, sums[0] > 0 ? least : 0.0, sums[2] / count, most,
                                       (sums[1] + sums[2]) / count, 0.5 * sums[3] / count, sums[4] / count, sums[5] / count};
  for (int k = 0; k < kTokenMetrics; ++k) args.metrics[k] = static_cast<float>(found[k]);
}

}  // namespace

std::int64_t ppo_row_parts(std::int64_t n_tokens, std::int64_t n_sequences) {
  // four tokens a thread of the average sequence; the sums of more than 64 blocks would be a launch's work again
  return std::clamp<std::int64_t>(n_tokens / (4 * THREADS * std::max<std::int64_t>(n_sequences, 1)), 1, 64);
}

const char* ppo_row_cuda(const PpoRowArgs& args, int device, void* stream) {
  Call call = {args, args.bounds ? ppo_row_parts(args.n_tokens, args.n_sequences) : (args.n_tokens + THREADS - 1) / THREADS};
  const std::int64_t blocks = args.bounds ? args.n_sequences * call.parts : call.parts;
  const char* error = blocks ? launch(ppo_row_kernel, blocks, THREADS, device, stream, call) : nullptr;
  if (error || !args.bounds) return error;
  return launch(ppo_metrics_kernel, 1, WARP, device, stream, call);
}

}  // namespace fastpref
