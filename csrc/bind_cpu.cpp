// Converts Python's integers to pointers, and nothing else. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include "gae.h"
#include "selective.h"
#include "threads.h"

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

static fastpref::Logits rows_of_logits(uintptr_t logits, uintptr_t targets, uintptr_t live, uintptr_t inv_temperature,
                                       int64_t n, int64_t vocab_size, int64_t stride, float logit_scale, float softcap) {
  return {ptr<const void>(logits), ptr<const int64_t>(targets), ptr<const uint8_t>(live), ptr<const float>(inv_temperature),
          n, vocab_size, stride, logit_scale, softcap};
}

static void selective_logps(const std::string& isa, const fastpref::Logits& rows, uintptr_t logps, uintptr_t entropy,
                            uintptr_t log_sum_sq_probs, uintptr_t mean_logits, uintptr_t is_top1, uintptr_t anchor,
                            uintptr_t total, int dtype, int n_threads) {
  const fastpref::SelectiveKernels& kernels = fastpref::selective_kernels(isa);
  const fastpref::TokenOutputs out = {ptr<float>(logps), ptr<float>(entropy), ptr<float>(log_sum_sq_probs), ptr<float>(mean_logits), ptr<uint8_t>(is_top1),
             ptr<float>(anchor), ptr<float>(total)};
  fastpref::on_live_threads(n_threads, [&] { kernels.forward(rows, out, static_cast<fastpref::Dtype>(dtype), n_threads); });
}

static void selective_d_logits(const std::string& isa, const fastpref::Logits& rows, uintptr_t grad_logps, uintptr_t grad_entropy,
                               uintptr_t logps, uintptr_t entropy, uintptr_t anchor, uintptr_t total, uintptr_t d_logits,
                               int dtype, int n_threads) {
  const fastpref::SelectiveKernels& kernels = fastpref::selective_kernels(isa);
  const fastpref::TokenGradients given = {ptr<const float>(grad_logps), ptr<const float>(grad_entropy), ptr<const float>(logps), ptr<const float>(entropy),
             ptr<const float>(anchor), ptr<const float>(total), ptr<void>(d_logits)};
  fastpref::on_live_threads(n_threads, [&] { kernels.backward(rows, given, static_cast<fastpref::Dtype>(dtype), n_threads); });
}

void bind_head(py::module_& m);  // csrc/bind_head.cpp

PYBIND11_MODULE(_cpu, m) {
  m.def("gae", &gae, py::call_guard<py::gil_scoped_release>());
  py::class_<fastpref::Logits>(m, "Logits").def(py::init(&rows_of_logits));
  m.def("selective_logps", &selective_logps, py::call_guard<py::gil_scoped_release>());
  m.def("selective_d_logits", &selective_d_logits, py::call_guard<py::gil_scoped_release>());
  bind_head(m);
}
