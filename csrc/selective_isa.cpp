// The kernels of selective_logps, compiled once for each instruction set; csrc/selective.cpp chooses.
#include "selective.h"

#include <cmath>
#include <cstring>

#include "vector.h"

namespace fastpref {
namespace FP_ISA {
namespace {

constexpr int BLOCK = 64;    // vectors of a row looked at before they are summed
constexpr int FLUSH = 8;     // vectors summed in fp32 before they are added in fp64
constexpr float RISE = 4.f;  // nats above the anchor that move it; further up, the rounding of sum e d spoils entropy

template <bool HAS_CAP, class S>
struct Row {
  const S* u;  // (V,)
  int64_t vocab_size, label;
  float logit_scale, softcap, inv_temperature;

  Row(const Logits& s, int64_t row)
      : u(static_cast<const S*>(s.logits) + row * s.stride), vocab_size(s.vocab_size), label(s.targets[row]),
        logit_scale(s.logit_scale), softcap(s.softcap), inv_temperature(s.inv_temperature[row]) {}

  // z T, and into slope d(z T)/du
  vfloat bent(vfloat x, vfloat* slope = nullptr) const {
    x = x * logit_scale;
    if (!HAS_CAP) return x;
    const vfloat th = vtanh(x / softcap);
    if (slope) *slope = logit_scale * (1.f - th * th);
    return th * softcap;
  }

  vfloat distance(vfloat x, float anchor) const { return bent(x) * inv_temperature - anchor; }

  // a vector whose first lanes are the last `left` entries from v, the others 0
  vfloat tail(int64_t v, int64_t left) const {
    S padded[VL] = {};
    std::memcpy(padded, u + v, left * sizeof(S));
    return load(padded);
  }

  // the label in every lane, so that it goes the way of all others
  vfloat at_label() const {
    S same[VL];
    for (S& x : same) x = u[label];
    return load(same);
  }
};

struct Sums {  // over v != y, but z
  double exp = 0, exp_d = 0, exp_sq = 0, z = 0, max_d = -HUGE_VAL, label_d = 0;
  float anchor = 0;
  bool is_top1 = false;
};

inline double add_lanes(const vdouble& x) {
  double sum = 0;
  for (int i = 0; i < VL; ++i) sum += x[i];
  return sum;
}

inline float highest_lane(const vfloat& x) {
  float highest = x[0];
  for (int i = 1; i < VL; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

// z - anchor of `count` entries from v into block, -inf after them; adds them to sum_z. Returns their maximum.
template <bool HAS_CAP, class S>
float distances(const Row<HAS_CAP, S>& row, int64_t v, int64_t count, float anchor, vfloat* block, double& sum_z) {
  vfloat sum{}, highest = splat(-HUGE_VALF);
  int64_t i = 0;
  for (; i + VL <= count; i += VL) {
    const vfloat d = block[i / VL] = row.distance(load(row.u + v + i), anchor);
    sum = sum + d;
    highest = d > highest ? d : highest;
  }
  if (i < count) {
    vfloat d = row.distance(row.tail(v + i, count - i), anchor);
    for (int64_t j = 0; j < VL; ++j) {
      if (i + j < count) sum[j] += d[j];
      else d[j] = -HUGE_VALF;
    }
    block[i / VL] = d;
    highest = d > highest ? d : highest;
  }
  sum_z += add_lanes(__builtin_convertvector(sum, vdouble)) + static_cast<double>(anchor) * count;
  return highest_lane(highest);
}

template <bool HAS_CAP, class S>
Sums sums_of(const Row<HAS_CAP, S>& row) {
  Sums sums;
  const float z_y = row.distance(row.at_label(), 0.f)[0];
  bool anchored = z_y != -HUGE_VALF;
  sums.anchor = anchored ? z_y : 0.f;
  vdouble exp{}, exp_d{}, exp_sq{};
  vfloat block[BLOCK];
  const int64_t bounds[2][2] = {{0, row.label}, {row.label + 1, row.vocab_size}};
  for (const auto& [first, last] : bounds) {
    for (int64_t v = first; v < last; v += BLOCK * VL) {
      const int64_t count = last - v < BLOCK * VL ? last - v : BLOCK * VL;
      double z = 0;
      float top = distances(row, v, count, sums.anchor, block, z);
      if ((top > RISE || !anchored) && std::isfinite(top)) {
        const float anchor = sums.anchor + top;
        // the first anchor of an impossible label may lie far below 0, where there is nothing to shrink
        const double rise = static_cast<double>(anchor) - sums.anchor, shrink = anchored ? std::exp(-rise) : 0.0;
        exp_d = (exp_d - exp * rise) * shrink;
        exp = exp * shrink;
        exp_sq = exp_sq * (shrink * shrink);
        sums.max_d -= rise;
        sums.anchor = anchor;
        anchored = true;
        z = 0;
        top = distances(row, v, count, anchor, block, z);
      }
      sums.z += z;
      sums.max_d = top > sums.max_d ? top : sums.max_d;
      const int64_t vectors = (count + VL - 1) / VL;
      for (int64_t k = 0; k < vectors;) {
        // in fp32 over a few only: entropy is the difference of two sums, and feels the rounding of both
        vfloat sum{}, sum_d{}, sum_sq{};
        for (const int64_t end = k + FLUSH < vectors ? k + FLUSH : vectors; k < end; ++k) {
          const vfloat d = block[k], e = vexp(d), floor = splat(-200.f);  // keeps 0 * inf out of the sums
          sum = sum + e;
          sum_d = sum_d + e * (d < floor ? floor : d);
          sum_sq = sum_sq + e * e;
        }
        exp = exp + __builtin_convertvector(sum, vdouble);
        exp_d = exp_d + __builtin_convertvector(sum_d, vdouble);
        exp_sq = exp_sq + __builtin_convertvector(sum_sq, vdouble);
      }
    }
  }
  sums.exp = add_lanes(exp);
  sums.exp_d = add_lanes(exp_d);
  sums.exp_sq = add_lanes(exp_sq);
  sums.label_d = static_cast<double>(row.bent(row.at_label())[0]) * row.inv_temperature - sums.anchor;
  sums.z += sums.label_d + sums.anchor;
  sums.is_top1 = sums.max_d <= row.distance(row.at_label(), sums.anchor)[0];
  return sums;
}

template <bool HAS_CAP, class S>
void forward_row(const Logits& s, const TokenOutputs& out, int64_t t) {
  const Sums sums = sums_of(Row<HAS_CAP, S>(s, t));
  const double e_y = std::exp(sums.label_d), total = e_y + sums.exp;
  const bool near = sums.label_d > -600;  // below, exp(-label_d) leaves the range of a double
  // -log1p(S' exp(-label_d)) keeps a confident row's precision, and its sign
  const double rest = near ? std::log1p(sums.exp * std::exp(-sums.label_d)) : std::log(total) - sums.label_d;
  const double entropy = near ? rest + (sums.label_d * sums.exp - sums.exp_d) / total : std::log(total) - sums.exp_d / total;
  const bool unknown = sums.max_d == HUGE_VAL || total != total;
  out.logps[t] = unknown ? NAN : static_cast<float>(0.0 - rest);
  out.entropy[t] = unknown ? NAN : static_cast<float>(entropy > 0 ? entropy : 0.0);
  out.log_sum_sq_probs[t] = unknown ? NAN : static_cast<float>(std::log(sums.exp_sq + e_y * e_y) - 2 * std::log(total));
  out.mean_logits[t] = static_cast<float>(sums.z / s.vocab_size);
  out.is_top1[t] = !unknown && sums.is_top1;
  out.anchor[t] = sums.anchor;
  out.total[t] = static_cast<float>(total);
}

template <bool HAS_CAP, class S>
void backward_row(const Logits& s, const TokenGradients& grads, int64_t t) {
  S* out = static_cast<S*>(grads.d_logits) + t * s.vocab_size;
  const float g = s.live[t] ? grads.grad_logps[t] : 0.f, h = s.live[t] && grads.grad_entropy ? grads.grad_entropy[t] : 0.f;
  if (g == 0.f && h == 0.f) {
    std::memset(out, 0, s.vocab_size * sizeof(S));
    return;
  }
  const Row<HAS_CAP, S> row(s, t);
  const float anchor = grads.anchor[t], inv_total = 1.f / grads.total[t], log_total = std::log(grads.total[t]);
  const float logp = grads.logps[t], entropy = grads.entropy[t], inv_t = row.inv_temperature;
  const vfloat floor = splat(-200.f);  // p log p is 0 where p is
  vfloat slope = splat(row.logit_scale);

  row.bent(row.at_label(), &slope);
  const float bounded = logp < floor[0] ? floor[0] : logp;
  S label[VL];
  store(label, slope * (inv_t * (-g * std::expm1(logp) - h * std::exp(logp) * (bounded + entropy))));

  auto gradient = [&](vfloat x) {
    const vfloat d = row.bent(x, &slope) * inv_t - anchor, log_p = d - log_total;
    return vexp(d) * slope * ((g + h * ((log_p < floor ? floor : log_p) + entropy)) * (-inv_t * inv_total));
  };
  int64_t v = 0;
  for (; v + VL <= s.vocab_size; v += VL) store(out + v, gradient(load(row.u + v)));
  S last[VL];
  store(last, gradient(row.tail(v, s.vocab_size - v)));
  std::memcpy(out + v, last, (s.vocab_size - v) * sizeof(S));
  out[row.label] = label[0];
}

// Rows differ in cost where some are skipped.
template <class S>
void forward(const Logits& s, const TokenOutputs& out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
  for (int64_t t = 0; t < s.n; ++t)
    if (s.live[t]) s.softcap > 0 ? forward_row<true, S>(s, out, t) : forward_row<false, S>(s, out, t);
}

template <class S>
void backward(const Logits& s, const TokenGradients& grads, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
  for (int64_t t = 0; t < s.n; ++t) s.softcap > 0 ? backward_row<true, S>(s, grads, t) : backward_row<false, S>(s, grads, t);
}

void forward_entry(const Logits& s, const TokenOutputs& out, Dtype dtype, int threads) {
  switch (dtype) {
    case kFloat32: return forward<float>(s, out, threads);
    case kBFloat16: return forward<bf16>(s, out, threads);
    case kFloat16: return forward<fp16>(s, out, threads);
  }
}

void backward_entry(const Logits& s, const TokenGradients& grads, Dtype dtype, int threads) {
  switch (dtype) {
    case kFloat32: return backward<float>(s, grads, threads);
    case kBFloat16: return backward<bf16>(s, grads, threads);
    case kFloat16: return backward<fp16>(s, grads, threads);
  }
}

}  // namespace

extern const SelectiveKernels selective;
const SelectiveKernels selective = {forward_entry, backward_entry};

}  // namespace FP_ISA
}  // namespace fastpref
