// Small calls of the launchers of csrc/*.cu, emulated, against the formulas in double; for the sanitizers.
//
// cases gae|dpo_row|ppo_row: 0, or 1 and what was wrong. Every buffer is a block of the heap of exactly its size, and
// results are NaN beforehand.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "../../csrc/dpo_row.h"
#include "../../csrc/gae.h"
#include "../../csrc/ppo_row.h"

using namespace fastpref;

static std::mt19937 bits(1);
static double normal() { return std::normal_distribution<double>()(bits); }
static bool chance(double p) { return std::uniform_real_distribution<double>()(bits) < p; }

template <class T>
struct Block {
  std::unique_ptr<T[]> data;
  std::int64_t size;
  explicit Block(std::int64_t size) : data(new T[size]), size(size) { std::memset(data.get(), 0xff, size * sizeof(T)); }
  template <class F>
  Block(std::int64_t size, F draw) : Block(size) {
    for (std::int64_t i = 0; i < size; ++i) data[i] = static_cast<T>(draw());
  }
  T* get() const { return data.get(); }
  T& operator[](std::int64_t i) const { return data[i]; }
};

static void near(double got, double want, const char* what, std::int64_t i) {
  if (std::fabs(got - want) <= 1e-5 * (1 + std::fabs(want))) return;
  std::printf("%s[%ld] is %.9g, not %.9g\n", what, static_cast<long>(i), got, want);
  std::exit(1);
}

static void ran(const char* error) {
  if (!error) return;
  std::printf("the launch says: %s\n", error);
  std::exit(1);
}

static void gae(std::int64_t b, std::int64_t t) {
  const double gamma = 0.99, lam = 0.95;
  Block<float> rewards(b * t, normal), values(b * t, normal), bootstrap(b, normal), advantages(b * t), returns(b * t);
  Block<std::uint8_t> mask(b * t, [] { return chance(0.7); }), dones(b * t, [] { return chance(0.05); });
  Block<double> sums(3 * b);
  for (std::int64_t i = 0; i < b * t; ++i)
    if (!mask[i]) rewards[i] = values[i] = NAN;
  ran(gae_cuda({rewards.get(), values.get(), mask.get(), dones.get(), bootstrap.get(), advantages.get(), returns.get(),
                sums.get(), b, t, gamma, lam}, 0, nullptr));
  for (std::int64_t row = 0; row < b; ++row) {
    double next_value = bootstrap[row], next = 0, total[3] = {};
    for (std::int64_t i = row * t + t - 1; i >= row * t; --i) {
      if (mask[i]) {
        const double going = dones[i] ? 0 : 1;
        next = rewards[i] + gamma * going * next_value - values[i] + gamma * lam * going * next;
        next_value = values[i];
        total[0] += 1, total[1] += advantages[i], total[2] += double(advantages[i]) * advantages[i];
      }
      near(advantages[i], mask[i] ? next : 0, "advantages", i);
      near(returns[i], mask[i] ? next + values[i] : 0, "returns", i);
    }
    for (int k = 0; k < 3; ++k) near(sums[3 * row + k], total[k], "sums", 3 * row + k);
  }
}

static void dpo_row(std::int64_t n, int loss) {
  const double beta = 0.3, e = 0.1, weight = 0.7;
  auto some = [] { return 3 * normal(); };
  Block<float> chosen(n, some), rejected(n, some), ref_chosen(n, some), ref_rejected(n, some);
  Block<std::int64_t> chosen_lengths(n, [] { return bits() % 9; }), rejected_lengths(n, [] { return bits() % 9; });
  Block<float> losses(n), d_chosen(n), d_rejected(n), chosen_rewards(n), rejected_rewards(n), metrics(kPairMetrics);
  ran(dpo_row_cuda({chosen.get(), rejected.get(), ref_chosen.get(), ref_rejected.get(), chosen_lengths.get(),
                    rejected_lengths.get(), losses.get(), d_chosen.get(), d_rejected.get(), chosen_rewards.get(),
                    rejected_rewards.get(), metrics.get(), n, loss, float(beta), float(e), float(weight)}, 0, nullptr));
  double total[kPairMetrics] = {};
  for (std::int64_t i = 0; i < n; ++i) {
    auto of = [&](double r_w, double r_l) {
      auto log_sigmoid = [](double z) { return -std::log1p(std::exp(-z)); };
      const double z = beta * (r_w - r_l), right = log_sigmoid(z), wrong = log_sigmoid(-z);
      const double m = r_w / std::max<double>(chosen_lengths[i], 1) - r_l / std::max<double>(rejected_lengths[i], 1);
      return weight * (loss == kSigmoid ? -(1 - e) * right - e * wrong
                       : loss == kRobust ? (-(1 - e) * right + e * wrong) / (1 - 2 * e)
                       : loss == kHinge  ? std::fmax(0, 1 - z)
                                         : (m - 0.5 / beta) * (m - 0.5 / beta));
    };
    const double r_w = chosen[i] - ref_chosen[i], r_l = rejected[i] - ref_rejected[i], h = 1e-5;
    near(losses[i], of(r_w, r_l), "losses", i);
    near(d_chosen[i], (of(r_w + h, r_l) - of(r_w - h, r_l)) / (2 * h), "chosen_slopes", i);
    near(d_rejected[i], (of(r_w, r_l + h) - of(r_w, r_l - h)) / (2 * h), "rejected_slopes", i);
    near(chosen_rewards[i], beta * r_w, "chosen_rewards", i);
    near(rejected_rewards[i], beta * r_l, "rejected_rewards", i);
    const double seen[] = {beta * r_w, beta * r_l, r_w > r_l ? 1. : 0., beta * (r_w - r_l), chosen[i], rejected[i]};
    for (int k = 0; k < kPairMetrics; ++k) total[k] += seen[k] / n;
  }
  for (int k = 0; k < kPairMetrics; ++k) near(metrics[k], total[k], "metrics", k);
}

// n_sequences 0: without metrics. bare: with nothing that may be left out.
static void ppo_row(std::int64_t n, std::int64_t n_sequences, int kl, bool bare) {
  const double low = 0.8, high = 1.3, delta = 2.0, weight = 0.6, kl_coef = 0.2, entropy_coef = 0.05;
  auto some = [] { return -1 + 0.5 * normal(); };
  Block<float> logps(n, some), old(n, some), advantages(n, normal), shares(n, [] { return chance(0.5) ? 0.25 : 0.5; });
  Block<float> weights(n, [] { return chance(0.2) ? 0 : 1.5; }), ref(n, some), entropy(n, [] { return std::fabs(normal()); });
  Block<std::uint8_t> mask(n, [] { return chance(0.7); });
  Block<std::int64_t> bounds(n_sequences + 1);
  for (std::int64_t s = 0; s <= n_sequences; ++s) bounds[s] = n_sequences ? s * s * n / (n_sequences * n_sequences) : 0;
  for (std::int64_t i = 0; i < n; ++i)
    if (!mask[i]) logps[i] = old[i] = advantages[i] = entropy[i] = NAN;
  Block<float> losses(n), d_logps(n), d_entropy(n), metrics(kTokenMetrics);
  Block<double> sums(n_sequences * ppo_row_parts(n, n_sequences) * kTokenSums);
  ran(ppo_row_cuda({logps.get(), bare ? nullptr : old.get(), advantages.get(), shares.get(), bare ? nullptr : weights.get(),
                    bare ? nullptr : ref.get(), bare ? nullptr : entropy.get(), mask.get(),
                    n_sequences ? bounds.get() : nullptr, losses.get(), d_logps.get(), bare ? nullptr : d_entropy.get(),
                    n_sequences ? sums.get() : nullptr, n_sequences ? metrics.get() : nullptr, n, n_sequences, float(low),
                    float(high), float(delta), float(weight), float(kl_coef), kl, float(entropy_coef)}, 0, nullptr));
  double total[kTokenSums] = {}, least = 1, most = 0;
  std::int64_t s = 0, of_s[3] = {};
  auto close_sequence = [&] {
    if (of_s[0]) least = std::fmin(least, double(of_s[1]) / of_s[0]), most = std::fmax(most, double(of_s[2]) / of_s[0]);
    of_s[0] = of_s[1] = of_s[2] = 0;
  };
  for (std::int64_t i = 0; i < n; ++i) {
    while (n_sequences && i >= bounds[s + 1]) close_sequence(), ++s;
    if (!mask[i]) {
      near(losses[i], 0, "losses", i), near(d_logps[i], 0, "d_logps", i);
      if (!bare) near(d_entropy[i], 0, "d_entropy", i);
      continue;
    }
    const double before = bare ? logps[i] : old[i], a = advantages[i];
    auto kl_of = [&](double l) { return bare ? 0 : kl == kK1 ? l : kl == kK2 ? l * l / 2 : std::exp(-l) - 1 + l; };
    auto of = [&](double logp) {
      const double r = std::exp(logp - before), dual = a < 0 && r > delta ? delta * a : std::fmin(r * a, std::fmin(std::fmax(r, low), high) * a);
      const double w = bare ? weight : weight * weights[i];
      return shares[i] * (-w * dual + kl_coef * kl_of(logp - ref[i]) - (bare ? 0 : entropy_coef * entropy[i]));
    };
    const double h = 1e-6, logp = logps[i], r = std::exp(logp - before);
    near(losses[i], of(logp), "losses", i);
    near(d_logps[i], (of(logp + h) - of(logp - h)) / (2 * h), "d_logps", i);
    if (!bare) near(d_entropy[i], -entropy_coef * shares[i], "d_entropy", i);
    const double seen[] = {1, a < 0 && r < low ? 1. : 0., a > 0 && r > high ? 1. : 0., (logp - before) * (logp - before),
                           kl_of(logp - ref[i]), bare ? 0 : entropy[i]};
    for (int k = 0; k < kTokenSums; ++k) total[k] += seen[k];
    of_s[0] += 1, of_s[1] += seen[1] > 0, of_s[2] += seen[2] > 0;
  }
  if (!n_sequences) return;
  close_sequence();
  const double count = total[0], want[] = {total[1] / count, least, total[2] / count, most, (total[1] + total[2]) / count,
                                           0.5 * total[3] / count, total[4] / count, total[5] / count};
  for (int k = 0; k < kTokenMetrics; ++k) near(metrics[k], want[k], "metrics", k);
}

int main(int, char** arguments) {
  const std::string op = arguments[1];
  if (op == "gae") {
    gae(2, 4);     // a warp of which one lane has steps
    gae(3, 131);   // four warps, no step aligned
    gae(1, 1036);  // eight warps, aligned, more than one stretch
  } else if (op == "dpo_row") {
    for (int loss : {kSigmoid, kRobust, kHinge, kIpo}) dpo_row(loss == kIpo ? 300 : 5, loss);
  } else {
    ppo_row(300, 3, kK3, false);
    ppo_row(2300, 1, kK2, false);  // two blocks a sequence
    ppo_row(70, 2, kK1, true);
    ppo_row(300, 0, kK1, false);
  }
  return 0;
}
