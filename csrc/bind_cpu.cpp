// Converts Python's integers to pointers, and nothing else. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include "gae.h"

namespace py = pybind11;
using std::int64_t;
using std::uintptr_t;

template <class T>
static T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static void gae(const std::string& isa, uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t dones,
                uintptr_t bootstrap, uintptr_t advantages, uintptr_t returns, uintptr_t sums, int64_t n_rows,
                int64_t n_steps, double gamma, double lam, int n_threads) {
  fastpref::gae_cpu(isa,
                    {ptr<const float>(rewards), ptr<const float>(values), ptr<const uint8_t>(mask),
                     ptr<const uint8_t>(dones), ptr<const float>(bootstrap), ptr<float>(advantages),
                     ptr<float>(returns), ptr<double>(sums), n_rows, n_steps, gamma, lam},
                    n_threads);
}

void bind_head(py::module_& m);  // csrc/bind_head.cpp

PYBIND11_MODULE(_cpu, m) {
  m.def("gae", &gae, py::call_guard<py::gil_scoped_release>());
  bind_head(m);
}
