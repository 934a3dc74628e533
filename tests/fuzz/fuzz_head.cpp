// csrc/head.h: `score` against plain loops in double, the two products on the chunk that it leaves, and label_dots.
#include "fuzz.h"

#ifdef FUZZ_AMX_EMULATED  // csrc/head_isa.cpp over tests/amx_emu
namespace fastpref::amx_emulated { extern const HeadKernels kernels; }
#endif

struct HeadCase {
  Dtype dtype;
  int64_t n, h, v, weight_stride, weight_column, stride;
  bool wild, some_without_label;
  float logit_scale, softcap;
  Buffer hidden, weight, bias, targets, anchor, inv_temperature, c0, c1, scaled;
  bool has_bias, stores, has_coefs, weight_fp32;
  std::vector<double> z, z_error, slope;  // (n, v) each: z, what rounding may do to it, 1 - tanh^2

  Dtype chunk_dtype() const { return dtype == kFloat32 ? kFloat32 : kBFloat16; }
  double x(int64_t t, int64_t i) const { return decode(hidden.data, dtype, t * h + i); }
  double w(int64_t y, int64_t i) const {
    return rounded(decode(weight.data, weight_dtype(), y * weight_stride + i * weight_column), dtype);
  }
  Dtype weight_dtype() const { return weight_fp32 ? kFloat32 : dtype; }

  HeadCase() {
    dtype = static_cast<Dtype>(rnd.whole(0, 2));
    n = rnd.chance(0.05) ? 0 : rnd.size({1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 95, 96, 97}, 40);
    h = rnd.size({1, 2, 3, 31, 32, 33, 63, 64, 65, 255, 256, 257}, 80);
    v = rnd.size({1, 2, 15, 16, 17, 47, 48, 49, 95, 96, 97, 479, 480, 481, 959, 960, 961}, 200);
    for (int64_t* size : {&n, &h, &v, &n}) {  // the loops in double take most of the time
      if (n * h * v > 500'000 && rnd.chance(0.7)) *size = rnd.whole(1, std::min<int64_t>(*size, 17));
    }
    weight_stride = rnd.chance(0.6) ? h : rnd.chance(0.2) ? rnd.whole(0, h) : h + rnd.whole(1, 70);
    weight_column = rnd.chance(0.8) ? 1 : rnd.whole(0, 3);
    if (rnd.chance(0.1)) weight_stride = 1, weight_column = v;
    weight_fp32 = dtype != kFloat32 && rnd.chance(0.3);
    stride = (n + kTokenPad - 1) / kTokenPad * kTokenPad;
    if (rnd.chance(0.2)) stride += kTokenPad * rnd.whole(1, 3);
    wild = rnd.chance(0.3), some_without_label = rnd.chance(0.2);
    has_bias = rnd.chance(0.5), stores = rnd.chance(0.7), has_coefs = stores && rnd.chance(0.5);
    logit_scale = rnd.chance(0.5) ? 1.f : float(rnd.between(-1.5, 1.5));
    softcap = rnd.chance(0.6) ? 0.f : float(rnd.between(0.5, 40));

    const double odd = wild ? rnd.between(0, 0.3) : 0, spread = rnd.between(0, 4) / std::sqrt(double(h));
    auto of_size = [&](double size) {
      return [=] { return rnd.chance(odd) ? kWild[rnd.whole(0, 12)] : rnd.chance(0.02) ? 0.f : float(rnd.normal() * size); };
    };
    hidden = floats(n * h, dtype, of_size(1));
    weight = floats((v - 1) * weight_stride + (h - 1) * weight_column + 1, weight_dtype(), of_size(spread));
    bias = floats(v, kFloat32, of_size(2));
    c0 = floats(n, kFloat32, of_size(1));
    c1 = floats(n, kFloat32, of_size(1));
    scaled = floats(n * h, kFloat32, of_size(1));
    inv_temperature = floats(n, kFloat32, [] { return float(rnd.between(0.3, 2)); });
    targets = Buffer(8 * n, 8, rnd.bits);
    for (int64_t t = 0; t < n; ++t) targets.as<int64_t>()[t] = rnd.chance(0.3) ? v - 1 : rnd.whole(0, v - 1);
    score_in_double();
    const bool at_maximum = rnd.chance(0.3);
    int64_t t = 0;
    anchor = floats(n, kFloat32, [&] {
      const double *row = z.data() + t * v, largest = *std::max_element(row, row + v), label = row[targets.as<int64_t>()[t++]];
      return float(at_maximum || largest - label > 40 ? largest : label);  // e^2 leaves fp32 at 44
    });
  }

  void score_in_double() {
    z.resize(n * v), z_error.resize(n * v), slope.resize(n * v);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t y = 0; y < v; ++y) {
        double u = has_bias ? bias.as<float>()[y] : 0, size = std::fabs(u);
        for (int64_t i = 0; i < h; ++i) u += x(t, i) * w(y, i), size += std::fabs(x(t, i) * w(y, i));
        u *= logit_scale, size *= std::fabs(logit_scale);
        const double tanh = softcap ? std::tanh(u / softcap) : 0, inverse = inv_temperature.as<float>()[t];
        z[t * v + y] = (softcap ? softcap * tanh : u) * inverse;
        z_error[t * v + y] = kEps * ((8 + std::sqrt(double(h))) * size + 8 * softcap + std::fabs(u)) * inverse;
        slope[t * v + y] = 1 - tanh * tanh;
      }
  }

  bool without_label(int64_t t) const { return some_without_label && t % 3 == 1; }

  std::string text(const std::string& isa) const {
    char line[300];
    std::snprintf(line, sizeof line,
                  "%s dtype %d, n %ld, h %ld, v %ld, weight strides %ld and %ld, stride %ld, scale %g, softcap %g%s%s%s%s%s",
                  isa.c_str(), int(dtype), long(n), long(h), long(v), long(weight_stride), long(weight_column), long(stride),
                  logit_scale, softcap, weight_fp32 ? ", fp32 weight" : "", wild ? ", wild" : "", has_bias ? ", bias" : "", stores ? ", stored" : "", has_coefs ? ", coefs" : "");
    return line;
  }
};

struct Scored {
  Buffer sums, stored;
};

// The same sums, of whole blocks of the vocabulary first and then of the rest.
static void in_two_parts(const HeadCase& c, const HeadKernels& kernels, const Buffer& hidden, const Buffer& targets, int64_t first,
                         int64_t n, const Buffer& want, int threads) {
  const int64_t cut = c.v / 2 / kVocabBlock * kVocabBlock;
  if (!cut) return;
  Buffer sums(kSums * n * 8, 8, rnd.bits), own = targets.copy(0, targets.bytes, 8, rnd.bits);
  sums.poison();
  auto row = [&](const Buffer& x) { return x.as<float>() + first; };
  for (int part = 0; part < 2; ++part) {
    const int64_t from = part ? cut : 0, count = part ? c.v - cut : cut;
    for (int64_t t = 0; t < c.n; ++t) {
      const int64_t y = targets.as<int64_t>()[t] - from;
      own.as<int64_t>()[t] = y >= 0 && y < count ? y : -1;
    }
    const int64_t width = c.weight_dtype() == kFloat32 ? 4 : 2;
    Scoring s{hidden.data, static_cast<char*>(c.weight.data) + from * c.weight_stride * width,
              c.has_bias ? c.bias.as<float>() + from : nullptr, own.as<int64_t>() + first, row(c.anchor), row(c.inv_temperature),
              nullptr, nullptr, sums.as<double>(), nullptr, n, c.h, count, c.weight_stride, 0, c.logit_scale, c.softcap,
              c.weight_column, c.weight_fp32};
    s.add = part;
    kernels.score(s, c.dtype, threads);
  }
  if (std::memcmp(sums.data, want.data, kSums * n * 8)) fail("other sums in two parts");
}

static Scored score(const HeadCase& c, const HeadKernels& kernels, const Buffer& targets, int64_t first, int64_t n, int64_t stride,
                    int threads) {
  const int64_t width = c.dtype == kFloat32 ? 4 : 2;
  // a copy of the rows in a buffer of their own, for a call that may read no other
  Buffer hidden = c.hidden.copy(first * c.h * width, n * c.h * width, width, rnd.bits);
  Scored out{Buffer(kSums * n * 8, 8, rnd.bits), Buffer(c.stores ? c.v * stride * width : 0, width, rnd.bits)};
  out.sums.poison(), out.stored.poison();
  auto row = [&](const Buffer& x) { return x.as<float>() + first; };
  kernels.score({hidden.data, c.weight.data, c.has_bias ? c.bias.as<float>() : nullptr, targets.as<int64_t>() + first,
                 row(c.anchor), row(c.inv_temperature), c.has_coefs ? row(c.c0) : nullptr, c.has_coefs ? row(c.c1) : nullptr,
                 out.sums.as<double>(), c.stores ? out.stored.data : nullptr, n, c.h, c.v, c.weight_stride, c.stores ? stride : 0,
                 c.logit_scale, c.softcap, c.weight_column, c.weight_fp32},
                c.dtype, threads);
  if (out.sums.has_poison(8)) fail("score left a sum unwritten");
  in_two_parts(c, kernels, hidden, targets, first, n, out.sums, threads);
  if (out.stored.has_poison(width)) fail("score left an entry of the chunk unwritten");
  return out;
}

static void check_sums(const HeadCase& c, const Buffer& targets, const Scored& out) {
  for (int64_t t = 0; t < c.n; ++t) {
    double want[kSums] = {0, 0, 0, 0, -double(kInf)}, error[kSums] = {};
    for (int64_t y = 0; y < c.v; ++y) {
      const double z = c.z[t * c.v + y], d = z - c.anchor.as<float>()[t];
      const double off = c.z_error[t * c.v + y] + kEps * (std::fabs(z) + std::fabs(d));
      want[kSumZ] += z, error[kSumZ] += off + 8 * kEps * std::fabs(z);
      const bool label = y == targets.as<int64_t>()[t];
      const double e = label ? 0 : std::exp(d), e_error = e * (off + 24 * kEps) + (label ? 0 : 1e-37);
      if (!label) {
        want[kSumExp] += e, error[kSumExp] += e_error;
        want[kSumExpD] += e * d, error[kSumExpD] += e_error * (std::fabs(d) + 1) + 8 * kEps * std::fabs(e * d);
        want[kSumExpSq] += e * e, error[kSumExpSq] += 2 * e_error * e;
        if (d > want[kMaxD]) want[kMaxD] = d, error[kMaxD] = std::max(error[kMaxD], off);
      }
      if (!c.stores) continue;
      const double coef = c.has_coefs ? c.c0.as<float>()[t] + c.c1.as<float>()[t] * d : 1, f = e * c.slope[t * c.v + y] * coef;
      const double coefs = c.has_coefs ? std::fabs(c.c0.as<float>()[t]) + std::fabs(c.c1.as<float>()[t]) * (std::fabs(d) + 1) : 1;
      const double rounding = c.dtype == kFloat32 ? 0 : std::fabs(f) / 256;
      expect_near(decode(out.stored.data, c.chunk_dtype(), y * c.stride + t), f,
                  rounding + e_error * coefs + 16 * (kEps + off * kEps) * e * coefs + 2 * off * e * coefs, "stored", y, t);
    }
    static const char* const kNames[kSums] = {"sum e", "sum e d", "sum e^2", "sum z", "max d"};
    for (int k = 0; k < kSums; ++k) {
      if (std::isinf(want[k])) continue;  // the maximum of nothing
      expect_near(out.sums.as<double>()[k * c.n + t], want[k], error[k] + 1e-30, kNames[k], t, k);
    }
  }
}

// A NaN is never lost: where a term of the sum is one, so is the sum.
static void check_nan(const HeadCase& c, const Buffer& targets, const Scored& out) {
  for (int64_t t = 0; t < c.n; ++t) {
    bool expected = false;
    for (int64_t y = 0; y < c.v; ++y)
      expected |= y != targets.as<int64_t>()[t] && std::isnan(c.z[t * c.v + y] - c.anchor.as<float>()[t]);
    if (expected && !std::isnan(out.sums.as<double>()[kSumExp * c.n + t])) fail("a NaN is lost in row " + std::to_string(t));
  }
}

static void check_score(const HeadCase& c, const HeadKernels& kernels, Buffer& stored) {
  Buffer targets = c.targets.copy(0, c.targets.bytes, 8, rnd.bits);
  for (int64_t t = 0; t < c.n; ++t)
    if (c.without_label(t)) targets.as<int64_t>()[t] = -1;
  Scored out = score(c, kernels, targets, 0, c.n, c.stride, 1);
  for (int64_t y = 0; c.stores && y < c.v; ++y)
    for (int64_t t = c.n; t < c.stride; ++t)
      expect_near(decode(out.stored.data, c.chunk_dtype(), y * c.stride + t), 0, 0, "stored past n", y, t);
  const Scored again = score(c, kernels, targets, 0, c.n, c.stride, int(rnd.whole(2, 3)));
  if (!same(out.sums, again.sums, c.dtype, true)) fail("other sums from other threads");
  if (!same(out.stored, again.stored, c.chunk_dtype())) fail("another chunk from other threads");
  if (c.n) {
    const int64_t first = rnd.whole(0, c.n - 1), few = rnd.whole(1, c.n - first);
    const Scored part = score(c, kernels, targets, first, few, (few + kTokenPad - 1) / kTokenPad * kTokenPad, 2);
    for (int64_t k = 0; k < kSums; ++k) {
      const Buffer whole = out.sums.copy((k * c.n + first) * 8, few * 8, 8, rnd.bits);
      if (!same(whole, part.sums.copy(k * few * 8, few * 8, 8, rnd.bits), c.dtype, true)) fail("rows depend on the other rows");
    }
  }
  if (c.wild) check_nan(c, targets, out);
  else check_sums(c, targets, out);
  stored = std::move(out.stored);
}

static void check_products(const HeadCase& c, const HeadKernels& kernels, const Buffer& stored) {
  const Dtype chunk = c.chunk_dtype();
  const double operand = c.dtype == kFloat32 ? 0 : 1 / 256.;  // operands of the products are bf16 for 16-bit inputs
  Buffer results[2][2];
  for (int run = 0; run < 2; ++run) {
    const int threads = run ? int(rnd.whole(2, 3)) : 1;
    Buffer& d_hidden = results[run][0] = Buffer(c.n * c.h * 4, 4, rnd.bits);
    d_hidden.poison();
    Product q{stored.data, c.weight.data, d_hidden.as<float>(), c.n, c.h, c.v, c.weight_stride, c.stride, false,
              c.weight_column, c.weight_fp32};
    kernels.d_hidden(q, c.dtype, threads);
    if (d_hidden.has_poison(4)) fail("d_hidden left an entry unwritten");
    q.accumulate = true;
    kernels.d_hidden(q, c.dtype, threads);

    Buffer& d_weight = results[run][1] = Buffer(c.v * c.h * 4, 4, rnd.bits);
    d_weight.poison();
    Product p{stored.data, c.scaled.data, d_weight.as<float>(), c.n, c.h, c.v, c.h, c.stride, false};
    kernels.d_weight(p, chunk, threads);
    if (d_weight.has_poison(4)) fail("d_weight left an entry unwritten");
    p.accumulate = true;
    kernels.d_weight(p, chunk, threads);
  }
  for (int k = 0; k < 2; ++k)
    if (!same(results[0][k], results[1][k], kFloat32)) fail(k ? "another d_weight from other threads" : "another d_hidden from other threads");
  if (c.wild) return;

  auto f = [&](int64_t y, int64_t t) { return decode(stored.data, chunk, y * c.stride + t); };
  for (int64_t i = 0; i < c.h; ++i) {
    for (int64_t t = 0; t < c.n; ++t) {
      double want = 0, size = 0;
      for (int64_t y = 0; y < c.v; ++y) want += 2 * f(y, t) * c.w(y, i), size += std::fabs(2 * f(y, t) * c.w(y, i));
      const double allowed = size * (kEps * (8 + std::sqrt(double(c.v))) + (c.dtype == kFloat16 ? operand : 0)) + 1e-30;
      expect_near(results[0][0].as<float>()[t * c.h + i], want, allowed, "twice d_hidden", t, i);
    }
    for (int64_t y = 0; y < c.v; ++y) {
      double want = 0, size = 0;
      for (int64_t t = 0; t < c.n; ++t) {
        const double term = 2 * f(y, t) * c.scaled.as<float>()[t * c.h + i];
        want += term, size += std::fabs(term);
      }
      const double allowed = size * (kEps * (8 + std::sqrt(double(c.n))) + operand) + 1e-30;
      expect_near(results[0][1].as<float>()[y * c.h + i], want, allowed, "twice d_weight", y, i);
    }
  }
}

// d_weight of 16-bit hidden, with the label's terms, rounded.
static void check_rounded(const HeadCase& c, const HeadKernels& kernels, const Buffer& stored) {
  if (c.dtype == kFloat32) return;
  Buffer targets = c.targets.copy(0, c.targets.bytes, 8, rnd.bits), results[2];
  for (int64_t t = 0; t < c.n; ++t)
    if (c.without_label(t)) targets.as<int64_t>()[t] = t % 2 ? -1 : c.v + t;
  for (int run = 0; run < 2; ++run) {
    results[run] = Buffer(c.v * c.h * 2, 2, rnd.bits);
    results[run].poison();
    Product p{stored.data, c.scaled.data, nullptr, c.n, c.h, c.v, c.h, c.stride, false};
    p.rounded = results[run].data, p.hidden = c.hidden.data, p.label = c.c1.as<float>(), p.targets = targets.as<int64_t>();
    kernels.d_weight(p, c.dtype, run ? int(rnd.whole(2, 3)) : 1);
    if (results[run].has_poison(2)) fail("the rounded d_weight left an entry unwritten");
  }
  if (!same(results[0], results[1], c.dtype)) fail("another rounded d_weight from other threads");
  if (c.wild) return;
  for (int64_t y = 0; y < c.v; ++y)
    for (int64_t i = 0; i < c.h; ++i) {
      double want = 0, size = 0;
      for (int64_t t = 0; t < c.n; ++t) {
        const double label = targets.as<int64_t>()[t] == y ? c.c1.as<float>()[t] * c.x(t, i) : 0;
        const double product = decode(stored.data, c.chunk_dtype(), y * c.stride + t) * c.scaled.as<float>()[t * c.h + i];
        want += product + label, size += std::fabs(product) + kEps * std::fabs(label) * 1024;
      }
      const double allowed = std::fabs(want) / 256 + size / 128 + 1e-7;  // 16 bits of the result and of the operand
      if (c.dtype == kFloat16 && std::fabs(want) + allowed > 65504) continue;  // it may be infinite
      expect_near(decode(results[0].data, c.dtype, y * c.h + i), want, allowed, "rounded d_weight", y, i);
    }
}

static void check_label_dots(const HeadCase& c) {
  Buffer out(8 * c.n, 8, rnd.bits), again(8 * c.n, 8, rnd.bits);
  out.poison();
  label_dots(c.hidden.data, c.weight.data, c.targets.as<int64_t>(), out.as<double>(), c.n, c.h, c.weight_stride, c.dtype, 1,
             c.weight_column, c.weight_fp32);
  label_dots(c.hidden.data, c.weight.data, c.targets.as<int64_t>(), again.as<double>(), c.n, c.h, c.weight_stride, c.dtype, 3,
             c.weight_column, c.weight_fp32);
  if (out.has_poison(8)) fail("label_dots left a row unwritten");
  if (!same(out, again, c.dtype, true)) fail("other dots from other threads");
  for (int64_t t = 0; t < c.n && !c.wild; ++t) {
    double want = 0, size = 0;
    for (int64_t i = 0; i < c.h; ++i) {
      const double term = c.x(t, i) * c.w(c.targets.as<int64_t>()[t], i);
      want += term, size += std::fabs(term);
    }
    expect_near(out.as<double>()[t], want, 1e-13 * size, "label_dots", t, 0);
  }
}

static std::vector<std::pair<std::string, const HeadKernels*>> head_kernels_of_this_processor() {
  std::vector<std::pair<std::string, const HeadKernels*>> found;
  for (const std::string& isa : isas()) found.emplace_back(isa, &head_kernels(isa));
#ifdef FUZZ_AMX_EMULATED
  // it has AVX512-BF16's instructions beside the emulated ones
  if (found.front().first == "avx512bf16") found.emplace_back("amx_emulated", &amx_emulated::kernels);
#endif
  return found;
}

void check_head(const std::string& only) {
  const HeadCase c;
  const std::string seed = now;
  now = seed + ": " + c.text("label_dots");
  check_label_dots(c);
  for (const auto& [isa, kernels] : head_kernels_of_this_processor()) {
    if (!only.empty() && isa != only) continue;
    now = seed + ": " + c.text(isa);
    Buffer stored;
    check_score(c, *kernels, stored);
    if (c.stores) check_products(c, *kernels, stored);
    if (c.stores) check_rounded(c, *kernels, stored);
  }
  now = seed;
}
