// Converts Python's integers to pointers and a CUDA error to an exception, and nothing else.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "dpo_row.h"
#include "gae.h"
#include "ppo_row.h"

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
                double lam, int device, uintptr_t stream) {
  check("gae", fastpref::gae_cuda({ptr<const float>(rewards), ptr<const float>(values), ptr<const uint8_t>(mask),
                                   ptr<const uint8_t>(dones), ptr<const float>(bootstrap), ptr<float>(advantages),
                                   ptr<float>(returns), ptr<double>(sums), n_rows, n_steps, gamma, lam},
                                  device, ptr<void>(stream)));
}

static void dpo_row(uintptr_t chosen, uintptr_t rejected, uintptr_t ref_chosen, uintptr_t ref_rejected,
                    uintptr_t chosen_lengths, uintptr_t rejected_lengths, uintptr_t losses, uintptr_t chosen_slopes,
                    uintptr_t rejected_slopes, uintptr_t chosen_rewards, uintptr_t rejected_rewards, uintptr_t metrics,
                    int64_t n_pairs, int loss, float beta, float smoothing, float weight, int device, uintptr_t stream) {
  check("dpo_row",
        fastpref::dpo_row_cuda({ptr<const float>(chosen), ptr<const float>(rejected), ptr<const float>(ref_chosen),
                                ptr<const float>(ref_rejected), ptr<const int64_t>(chosen_lengths),
                                ptr<const int64_t>(rejected_lengths), ptr<float>(losses), ptr<float>(chosen_slopes),
                                ptr<float>(rejected_slopes), ptr<float>(chosen_rewards), ptr<float>(rejected_rewards),
                                ptr<float>(metrics), n_pairs, loss, beta, smoothing, weight},
                               device, ptr<void>(stream)));
}

static void ppo_row(uintptr_t logps, uintptr_t old_logps, uintptr_t advantages, uintptr_t shares, uintptr_t token_weights,
                    uintptr_t ref_logps, uintptr_t entropy, uintptr_t mask, uintptr_t bounds, uintptr_t losses,
                    uintptr_t d_logps, uintptr_t d_entropy, uintptr_t sums, uintptr_t metrics, int64_t n_tokens,
                    int64_t n_sequences, float low, float high, float delta, float weight, float kl_coef, int kl,
                    float entropy_coef, int device, uintptr_t stream) {
  check("ppo_row",
        fastpref::ppo_row_cuda({ptr<const float>(logps), ptr<const float>(old_logps), ptr<const float>(advantages),
                                ptr<const float>(shares), ptr<const float>(token_weights), ptr<const float>(ref_logps),
                                ptr<const float>(entropy), ptr<const uint8_t>(mask), ptr<const int64_t>(bounds),
                                ptr<float>(losses), ptr<float>(d_logps), ptr<float>(d_entropy), ptr<double>(sums),
                                ptr<float>(metrics), n_tokens, n_sequences, low, high, delta, weight, kl_coef, kl,
                                entropy_coef},
                               device, ptr<void>(stream)));
}

PYBIND11_MODULE(_cuda, m) {
  m.def("gae", &gae);
  m.def("dpo_row", &dpo_row);
  m.def("ppo_row", &ppo_row);
  m.def("ppo_row_parts", &fastpref::ppo_row_parts);
}
