#include "gae.h"

namespace fastpref {
namespace {

// With G = V + lam A the recursion is one affine map a step:  A_t = r_t - V_t + gamma G_next,
// G_t = V_t + lam (r_t - V_t) + gamma lam G_next. In double: the error is then that of rounding the result.
void gae_row(const GaeArgs& args, std::int64_t row) {
  const std::int64_t start = row * args.n_steps;
  const double gamma = args.gamma, lam = args.lam;
  double g = args.bootstrap ? args.bootstrap[row] : 0.0;
  for (std::int64_t i = start + args.n_steps - 1; i >= start; --i) {
    if (args.mask && !args.mask[i]) {
      args.advantages[i] = args.returns[i] = 0.0f;
      continue;
    }
    // a branch, not a product: a NaN after a terminal step must not cross it
    const double g_next = args.dones && args.dones[i] ? 0.0 : g;
    const double reward = args.rewards[i], value = args.values[i];
    args.returns[i] = static_cast<float>(reward + gamma * g_next);
    args.advantages[i] = static_cast<float>(reward - value + gamma * g_next);
    g = value + lam * (reward - value) + gamma * lam * g_next;
  }
}

}  // namespace

void gae_cpu(const GaeArgs& args, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (std::int64_t row = 0; row < args.n_rows; ++row) gae_row(args, row);
}

}  // namespace fastpref
