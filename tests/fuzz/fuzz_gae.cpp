// csrc/gae.h against the recursion in double.
#include "../../csrc/gae.h"
#include "fuzz.h"

void check_gae() {
  const int64_t b = rnd.size({0, 1, 2, 7, 8, 9}, 20), t = rnd.size({0, 1, 2, 7, 8, 9, 15, 16, 17, 64, 65}, 40);
  const bool wild = rnd.chance(0.3), has_mask = rnd.chance(0.6), has_dones = rnd.chance(0.6), has_bootstrap = rnd.chance(0.6);
  const double gamma = rnd.chance(0.3) ? 1 : rnd.between(0, 1), lam = rnd.chance(0.3) ? 0 : rnd.between(0, 1);
  char line[200];
  std::snprintf(line, sizeof line, ": gae b %ld, t %ld%s%s%s%s", long(b), long(t), wild ? ", wild" : "", has_mask ? ", mask" : "",
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
  Buffer results[2][2];
  for (int run = 0; run < 2; ++run) {
    for (Buffer& x : results[run]) x = Buffer(b * t * 4, 4, rnd.bits), x.poison();
    gae_cpu({rewards.as<float>(), values.as<float>(), has_mask ? mask.as<uint8_t>() : nullptr,
             has_dones ? dones.as<uint8_t>() : nullptr, has_bootstrap ? bootstrap.as<float>() : nullptr, results[run][0].as<float>(),
             results[run][1].as<float>(), b, t, gamma, lam},
            run ? 3 : 1);
    if (results[run][0].has_poison(4) || results[run][1].has_poison(4)) fail("gae left a step unwritten");
  }
  for (int k = 0; k < 2; ++k)
    if (!same(results[0][k], results[1][k], kFloat32)) fail("other results from other threads");
  for (int64_t row = 0; row < b; ++row) {
    double next_value = has_bootstrap ? bootstrap.as<float>()[row] : 0, next = 0, size = std::fabs(next_value);
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
      expect_near(advantage, next, 8 * kEps * (size + 1), "advantages", row, i - row * t);
      expect_near(returned, next + value, 8 * kEps * (size + 1), "returns", row, i - row * t);
    }
  }
}
