// What the fuzzed calls share: random draws, the three dtypes, buffers that start as poison, and checks that end the run.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/head_dispatch.h"
#include "exact_buffer.h"

using namespace fastpref;

void check_head(const std::string& only_isa);
void check_selective(const std::string& only_isa);
void check_gae_everywhere(const std::string& only_isa);

// what runs: said when a check or a sanitizer, the leak detector at exit included, ends the run
inline std::string& now = *new std::string("nothing yet");

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("FAILED: %s\n  in %s\n", what.c_str(), now.c_str());
  std::exit(1);
}

struct Random {
  std::mt19937_64 bits;
  bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(bits) < p; }
  double between(double low, double high) { return std::uniform_real_distribution<>(low, high)(bits); }
  double normal() { return std::normal_distribution<>()(bits); }
  int64_t whole(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(bits); }
  int64_t size(const std::vector<int64_t>& edges, int64_t largest) {
    return chance(0.5) ? edges[whole(0, edges.size() - 1)] : whole(1, largest);
  }
};

inline Random rnd;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kEps = std::numeric_limits<float>::epsilon();
inline const float kWild[] = {0.f, -0.f, kInf, -kInf, NAN, 1e-40f, -1e-45f, 3e38f, -3e38f, 1e30f, 65504.f, 1e-20f, 88.f};

inline double decode(const void* data, Dtype dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  if (dtype == kBFloat16) {
    const uint32_t word = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double size = exponent == 31 ? (mantissa ? NAN : double(kInf))
                                     : std::ldexp(exponent ? 1024 + mantissa : mantissa, std::max(exponent, 1) - 25);
  return half & 0x8000 ? -size : size;
}

// to the nearest, ties to even
inline double rounded(double x, Dtype dtype) {
  if (dtype == kFloat32 || x == 0 || !std::isfinite(x)) return x;
  const bool is_half = dtype == kFloat16;
  const int exponent = std::max(std::ilogb(x), is_half ? -14 : -126);
  const double unit = std::ldexp(1, exponent - (is_half ? 10 : 7)), nearest = std::nearbyint(x / unit) * unit;
  return std::fabs(nearest) > (is_half ? 65504 : 3.3895313892515355e38) ? std::copysign(double(kInf), x) : nearest;
}

// towards zero: any value of the dtype will do
inline uint16_t encode(float x, Dtype dtype) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if (dtype == kBFloat16) return std::isnan(x) ? 0x7fc0 : word >> 16;
  const uint16_t sign = word >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (size > 65504) return sign | 0x7c00;
  if (size < 6.103515625e-5f) return sign | uint16_t(size * 16777216.f);
  return sign | uint16_t(((word >> 23 & 255) - 112) << 10 | (word >> 13 & 1023));
}

template <class Draw>
Buffer floats(int64_t count, Dtype dtype, Draw&& draw) {
  const int64_t width = dtype == kFloat32 ? 4 : 2;
  Buffer buffer(count * width, width, rnd.bits);
  for (int64_t i = 0; i < count; ++i) {
    const float x = draw();
    if (dtype == kFloat32) buffer.as<float>()[i] = x;
    else buffer.as<uint16_t>()[i] = encode(x, dtype);
  }
  return buffer;
}

inline bool same(const Buffer& a, const Buffer& b, Dtype dtype, bool doubles = false) {
  if (std::memcmp(a.data, b.data, a.bytes) == 0) return true;
  const int64_t width = doubles ? 8 : dtype == kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < a.bytes / width; ++i) {  // a NaN may be another NaN
    const double x = doubles ? a.as<double>()[i] : decode(a.data, dtype, i);
    const double y = doubles ? b.as<double>()[i] : decode(b.data, dtype, i);
    if (!(std::isnan(x) && std::isnan(y)) && (x != y || std::signbit(x) != std::signbit(y))) return false;
  }
  return true;
}

inline void expect_near(double got, double want, double allowed, const char* name, int64_t i, int64_t j) {
  if (std::fabs(got - want) <= allowed) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s[%ld, %ld] is %.9g, not %.9g (+- %.2g)", name, long(i), long(j), got, want, allowed);
  fail(text);
}
