// csrc/gae.h against the recursion in double.
#include "../../csrc/gae.h"
#include "fuzz.h"

static void check_gae(const std::string& isa) {
  const int64_t b = rnd.size({0, 1, 2, 7, 8, 9}, 20), t = rnd.size({0, 1, 2, 7, 8, 9, 15, 16, 17, 64, 65}, 40);
  const bool wild = rnd.chance(0.3), has_mask = rnd.chance(0.6), has_dones = rnd.chance(0.6), has_bootstrap = rnd.chance(0.6),
             has_sums = rnd.chance(0.5);
  const double gamma = rnd.chance(0.3) ? 1 : rnd.between(0, 1), lam = rnd.chance(0.3) ? 0 : rnd.between(0, 1);
  char line[200];
  std::snprintf(line, sizeof line, ": gae %s b %ld, t %ld%s%s%s%s", isa.c_str(), long(b), long(t), wild ? ", wild" : "", has_mask ? ", mask" : "",
                has_dones ? ", dones" : "", has_bootstrap ? ", bootstrap" : "");
  now += line;
  auto draw = [&] { return wild && rnd.chance(0.1) ? kWild[rnd.whole(0, 12)] : float(rnd.normal()); };
  Buffer rewards = floats(b * t, kFloat32, draw), values = floats(b * t, kFloat32, draw), bootstrap = floats(b, kFloat32, draw);
  Buffer mask(b * t, 1, rnd.bits), dones(b * t, 1, rnd.bits);
  for (int64_t i = 0; i < b * t; ++i) {
    mask.as<uint8_t>()[i] = rnd.chance(0.7) ? rnd.whole(1, 255) : 0;  // any nonzero byte is true
    dones.as<uint8_t>()[i] = rnd.chance(0.2) ? rnd.whole(1, 255) : 0;
    if (has_mask && !mask.as<uint8_t>()[i]) rewards.as<float>()[i] = values.as<float>()[i] = NAN;
  }
  Buffer results[2][2], sums(has_sums ? 3 * 8 * b : 0, 8, rnd.bits);
  for (int run = 0; run < 2; ++run) {
    for (Buffer& x : results[run]) x = Buffer(b * t * 4, 4, rnd.bits), x.poison();
    sums.poison();
    gae_cpu(isa,
            {rewards.as<float>(), values.as<float>(), has_mask ? mask.as<uint8_t>() : nullptr,
             has_dones ? dones.as<uint8_t>() : nullptr, has_bootstrap ? bootstrap.as<float>() : nullptr, results[run][0].as<float>(),
             results[run][1].as<float>(), has_sums ? sums.as<double>() : nullptr, b, t, gamma, lam},
            run ? 3 : 1);
    if (results[run][0].has_poison(4) || results[run][1].has_poison(4) || sums.has_poison(8)) fail("gae left a step unwritten");
  }
  for (int k = 0; k < 2; ++k)
    if (!same(results[0][k], results[1][k], kFloat32)) fail("other results from other threads");
  for (int64_t row = 0; row < b; ++row) {
    double next_value = has_bootstrap ? bootstrap.as<float>()[row] : 0, next = 0, size = std::fabs(next_value);
    double total[3] = {}, total_size = 0;
    for (int64_t i = row * t + t - 1; i >= row * t; --i) {
      const float advantage = results[0][0].as<float>()[i], returned = results[0][1].as<float>()[i];
      if (has_mask && !mask.as<uint8_t>()[i]) {
        if (advantage != 0 || returned != 0) fail("a masked step is not 0");
        continue;
      }
      if (wild) continue;
      const double going = has_dones && dones.as<uint8_t>()[i] ? 0 : 1, value = values.as<float>()[i];
      next = rewards.as<float>()[i] + gamma * going * next_value - value + gamma * lam * going * next;
      next_value = value, size += std::fabs(value) + std::fabs(rewards.as<float>()[i]);
      total[0] += 1, total[1] += next, total[2] += next * next, total_size += std::fabs(next);
      expect_near(advantage, next, 8 * kEps * (size + 1), "advantages", row, i - row * t);
      expect_near(returned, next + value, 8 * kEps * (size + 1), "returns", row, i - row * t);
    }
    if (wild || !has_sums) continue;
    const double off = 16 * kEps * (size + 1);  // of one advantage
    expect_near(sums.as<double>()[3 * row], total[0], 0, "live steps", row, 0);
    expect_near(sums.as<double>()[3 * row + 1], total[1], off * total[0], "sum of advantages", row, 0);
    expect_near(sums.as<double>()[3 * row + 2], total[2], 2 * off * (total_size + total[0]), "sum of squares", row, 0);
  }
}

void check_gae_everywhere(const std::string& only) {
  const Random from = rnd;  // the same case for each
  const std::string seed = now;
  for (const std::string& isa : isas()) {
    if (!only.empty() && isa != only) continue;
    rnd = from, now = seed;
    check_gae(isa);
  }
  now = seed;
}
