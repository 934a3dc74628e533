// Converts Python's integers to pointers and a CUDA error to an exception, and nothing else.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "gae.h"

using std::int64_t;
using std::uintptr_t;

template <class T>
static T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static void check(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA says: " + error);
}

static void gae(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t dones, uintptr_t bootstrap,
                uintptr_t advantages, uintptr_t returns, uintptr_t sums, int64_t n_rows, int64_t n_steps, double gamma,
                double lam, uintptr_t stream) {
  check("gae", fastpref::gae_cuda({ptr<const float>(rewards), ptr<const float>(values), ptr<const uint8_t>(mask),
                                   ptr<const uint8_t>(dones), ptr<const float>(bootstrap), ptr<float>(advantages),
                                   ptr<float>(returns), ptr<double>(sums), n_rows, n_steps, gamma, lam},
                                  ptr<void>(stream)));
}

PYBIND11_MODULE(_cuda, m) { m.def("gae", &gae); }
