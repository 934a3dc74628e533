// csrc/selective.h: outputs of rows of logits, and the gradient, also written over the logits, against plain loops.
#include "../../csrc/selective.h"
#include "fuzz.h"

namespace {

struct LogitsCase {
  Dtype dtype;
  int64_t n, v, stride;
  bool wild, has_entropy, in_place;
  float logit_scale, softcap;
  Buffer logits, targets, live, inv_temperature, grad_logps, grad_entropy;

  LogitsCase() {
    dtype = static_cast<Dtype>(rnd.whole(0, 2));
    n = rnd.chance(0.05) ? 0 : rnd.size({1, 2, 3, 7, 8, 9}, 20);
    v = rnd.size({1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 479, 480, 481, 1023, 1024, 1025, 4097}, 300);
    stride = rnd.chance(0.6) ? v : rnd.chance(0.2) ? rnd.whole(0, v) : v + rnd.whole(1, 40);
    in_place = stride == v && rnd.chance(0.5);
    wild = rnd.chance(0.3), has_entropy = rnd.chance(0.6);
    logit_scale = rnd.chance(0.5) ? 1.f : float(rnd.between(-1.5, 1.5));
    softcap = rnd.chance(0.6) ? 0.f : float(rnd.between(0.5, 40));
    const double odd = wild ? rnd.between(0, 0.3) : 0, spread = rnd.between(0, 12);
    auto of_size = [&](double size, double odd) {
      return [=] { return rnd.chance(odd) ? kWild[rnd.whole(0, 12)] : float(rnd.normal() * size); };
    };
    logits = floats(n ? (n - 1) * stride + v : 0, dtype, of_size(spread, odd));
    grad_logps = floats(n, kFloat32, of_size(1, odd));
    grad_entropy = floats(n, kFloat32, of_size(1, odd));
    inv_temperature = floats(n, kFloat32, [] { return float(rnd.between(0.3, 2)); });
    targets = Buffer(8 * n, 8, rnd.bits), live = Buffer(n, 1, rnd.bits);
    for (int64_t t = 0; t < n; ++t) {
      live.as<uint8_t>()[t] = rnd.chance(0.8);
      targets.as<int64_t>()[t] = !is_live(t) ? -100 : rnd.chance(0.2) ? v - 1 : rnd.whole(0, v - 1);
    }
  }

  bool is_live(int64_t t) const { return live.as<uint8_t>()[t]; }

  Logits rows(const Buffer& from, int64_t first, int64_t count) const {
    const int64_t width = dtype == kFloat32 ? 4 : 2;
    return {from.data + first * stride * width, targets.as<int64_t>() + first, live.as<uint8_t>() + first,
            inv_temperature.as<float>() + first, count, v, stride, logit_scale, softcap};
  }

  std::string text(const std::string& isa) const {
    char line[200];
    std::snprintf(line, sizeof line, "selective %s dtype %d, n %ld, v %ld, stride %ld, scale %g, softcap %g%s%s%s", isa.c_str(),
                  int(dtype), long(n), long(v), long(stride), logit_scale, softcap, wild ? ", wild" : "",
                  has_entropy ? ", entropy" : "", in_place ? ", in place" : "");
    return line;
  }
};

enum Output { kLogps, kEntropy, kLogSumSq, kMeanLogits, kAnchor, kTotal, kOutputs };

struct Forward {
  Buffer floats[kOutputs], top1;
};

Forward forward(const LogitsCase& c, const SelectiveKernels& kernels, int64_t first, int64_t n, int threads) {
  Forward out;
  for (Buffer& x : out.floats) x = Buffer(4 * n, 4, rnd.bits), x.poison();
  out.top1 = Buffer(n, 1, rnd.bits), out.top1.poison();
  auto at = [&](Output k) { return out.floats[k].as<float>(); };
  kernels.forward(c.rows(c.logits, first, n),
                  {at(kLogps), at(kEntropy), at(kLogSumSq), at(kMeanLogits), out.top1.as<uint8_t>(), at(kAnchor), at(kTotal)}, c.dtype,
                  threads);
  for (int64_t t = 0; t < n; ++t) {
    for (const Buffer& x : out.floats)
      if (x.copy(4 * t, 4, 4, rnd.bits).has_poison(4) == c.is_live(first + t))
        fail(c.is_live(first + t) ? "forward left a live row unwritten" : "forward wrote a row that is not live");
    if (c.is_live(first + t) && out.top1.as<uint8_t>()[t] > 1) fail("is_top1 is neither 0 nor 1");
  }
  return out;
}

Buffer backward(const LogitsCase& c, const SelectiveKernels& kernels, const Forward& from, bool in_place, int threads) {
  const int64_t width = c.dtype == kFloat32 ? 4 : 2;
  Buffer out = in_place ? c.logits.copy(0, c.logits.bytes, width, rnd.bits) : Buffer(c.n * c.v * width, width, rnd.bits);
  if (!in_place) out.poison();
  auto at = [&](Output k) { return from.floats[k].as<float>(); };
  kernels.backward(c.rows(in_place ? out : c.logits, 0, c.n),
                   {c.grad_logps.as<float>(), c.has_entropy ? c.grad_entropy.as<float>() : nullptr, at(kLogps), at(kEntropy),
                    at(kAnchor), at(kTotal), out.data},
                   c.dtype, threads);
  if (!in_place && out.has_poison(width)) fail("backward left an entry unwritten");
  for (int64_t t = 0; t < c.n; ++t)
    for (int64_t y = 0; !c.is_live(t) && y < c.v; ++y)
      if (decode(out.data, c.dtype, t * c.v + y) != 0) fail("the gradient of a row that is not live is not 0");
  return out;
}

void check_row(const LogitsCase& c, int64_t t, const Forward& out, const Buffer& gradient) {
  const double inverse = c.inv_temperature.as<float>()[t], scale = c.logit_scale;
  std::vector<double> z(c.v), error(c.v), slope(c.v);
  double largest = -double(kInf), worst = 0, mean = 0, size = 0;
  for (int64_t y = 0; y < c.v; ++y) {
    const double u = scale * decode(c.logits.data, c.dtype, t * c.stride + y), tanh = c.softcap ? std::tanh(u / c.softcap) : 0;
    z[y] = (c.softcap ? c.softcap * tanh : u) * inverse, slope[y] = 1 - tanh * tanh;
    error[y] = 8 * kEps * (c.softcap + std::fabs(u)) * inverse + 2 * kEps * std::fabs(z[y]);
    largest = std::max(largest, z[y]), worst = std::max(worst, error[y]);
    mean += z[y] / c.v, size += std::fabs(z[y]) / c.v;
  }
  double sum = 0, entropy = 0, sum_sq = 0;
  for (double x : z) sum += std::exp(x - largest), sum_sq += std::exp(2 * (x - largest));
  const double lse = largest + std::log(sum);
  for (double x : z) entropy -= std::exp(x - lse) * (x - lse);
  const int64_t label = c.targets.as<int64_t>()[t];
  const double off = 4 * worst + 8 * kEps * (1 + std::fabs(lse - z[label]));
  auto expect = [&](Output k, double want, double allowed, const char* name) {
    expect_near(out.floats[k].as<float>()[t], want, allowed, name, t, 0);
  };
  expect(kLogps, z[label] - lse, off, "logps");
  expect(kEntropy, entropy, 2 * off * (1 + entropy), "entropy");
  expect(kLogSumSq, 2 * (largest - lse) + std::log(sum_sq), 2 * off + 8 * kEps * std::fabs(largest - lse), "log_sum_sq_probs");
  expect(kMeanLogits, mean, worst + 8 * kEps * size, "mean_logits");
  const double anchor = out.floats[kAnchor].as<float>()[t], total = out.floats[kTotal].as<float>()[t];
  expect_near(anchor + std::log(total), lse, off + 4 * kEps * (std::fabs(anchor) + std::fabs(lse)), "anchor + log total", t, 0);
  if (std::fabs(z[label] - largest) > 2 * worst && out.top1.as<uint8_t>()[t]) fail("is_top1 of a label below the maximum");
  if (z[label] == largest && c.v > 1) {
    double second = -double(kInf);
    for (int64_t y = 0; y < c.v; ++y) second = std::max(second, y == label ? second : z[y]);
    if (largest - second > 2 * worst && !out.top1.as<uint8_t>()[t]) fail("is_top1 of the maximum is 0");
  }

  const double g = c.grad_logps.as<float>()[t], h = c.has_entropy ? c.grad_entropy.as<float>()[t] : 0;
  for (int64_t y = 0; y < c.v; ++y) {
    const double logp = z[y] - lse, p = std::exp(logp), factor = slope[y] * scale * inverse;
    const double want = factor * ((y == label ? g : 0) - p * (g + h * (logp + entropy)));
    const double parts = p * (std::fabs(g) + std::fabs(h) * (std::fabs(logp) + entropy + 1));
    const double rounding = c.dtype == kFloat32 ? 2 * kEps : c.dtype == kBFloat16 ? 1 / 256. : 1 / 1024.;
    const double saturated = c.softcap ? 32 * kEps + 4 * error[y] / c.softcap / inverse : 0;  // of 1 - tanh^2
    const double allowed = std::fabs(want) * rounding + std::fabs(factor) * parts * 4 * off +
                           saturated * std::fabs(scale * inverse) * (parts + (y == label ? std::fabs(g) : 0)) +
                           (c.dtype == kFloat16 ? 6e-8 : 1e-30);
    expect_near(decode(gradient.data, c.dtype, t * c.v + y), want, allowed, "d_logits", t, y);
  }
}

}  // namespace

void check_selective(const std::string& only) {
  const LogitsCase c;
  const std::string seed = now;
  for (const std::string& isa : isas()) {
    if (!only.empty() && isa != only) continue;
    now = seed + ": " + c.text(isa);
    const SelectiveKernels& kernels = selective_kernels(isa);
    const Forward out = forward(c, kernels, 0, c.n, 1), again = forward(c, kernels, 0, c.n, int(rnd.whole(2, 3)));
    for (int k = 0; k < kOutputs; ++k)
      if (!same(out.floats[k], again.floats[k], kFloat32)) fail("other outputs from other threads");
    if (c.n) {
      const int64_t first = rnd.whole(0, c.n - 1), few = rnd.whole(1, c.n - first);
      const Forward part = forward(c, kernels, first, few, 2);
      for (int k = 0; k < kOutputs; ++k)
        if (!same(out.floats[k].copy(4 * first, 4 * few, 4, rnd.bits), part.floats[k], kFloat32)) fail("rows depend on the other rows");
    }
    const Buffer gradient = backward(c, kernels, out, false, 1);
    if (!same(gradient, backward(c, kernels, out, c.in_place, int(rnd.whole(2, 3))), c.dtype))
      fail("another gradient from other threads, or in place");
    for (int64_t t = 0; t < c.n && !c.wild; ++t)
      if (c.is_live(t)) check_row(c, t, out, gradient);
  }
  now = seed;
}
