// pybind11 binding of the head: addresses in, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "head_dispatch.h"
#include "threads.h"

namespace py = pybind11;
using namespace fastpref;

template <class T>
static T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

void bind_head(py::module_& m) {
  m.attr("token_pad") = kTokenPad;
  m.def("isas", &isas);
  m.def("label_dots", [](uintptr_t hidden, uintptr_t weight, uintptr_t targets, uintptr_t out, int64_t n, int64_t hidden_size,
                         int64_t weight_stride, int64_t weight_column, int dtype, bool weight_fp32, int threads) {
    py::gil_scoped_release release;
    label_dots(at<void>(hidden), at<void>(weight), at<int64_t>(targets), at<double>(out), n, hidden_size, weight_stride,
               static_cast<Dtype>(dtype), threads, weight_column, weight_fp32);
  });
  m.def("head_score", [](const std::string& isa, uintptr_t hidden, uintptr_t weight, uintptr_t bias, uintptr_t targets,
                         uintptr_t anchor, uintptr_t inv_temperature, uintptr_t c0, uintptr_t c1, uintptr_t sums, uintptr_t stored,
                         int64_t n, int64_t hidden_size, int64_t vocab_size, int64_t weight_stride, int64_t weight_column,
                         int64_t stride, float logit_scale, float softcap, int dtype, bool weight_fp32, bool add, int threads) {
    const Scoring s{at<void>(hidden), at<void>(weight), at<float>(bias), at<int64_t>(targets), at<float>(anchor),
                    at<float>(inv_temperature), at<float>(c0), at<float>(c1), at<double>(sums), at<void>(stored),
                    n, hidden_size, vocab_size, weight_stride, stride, logit_scale, softcap, weight_column, weight_fp32, add};
    py::gil_scoped_release release;
    on_live_threads(threads, [&] { head_kernels(isa).score(s, static_cast<Dtype>(dtype), threads); });
  });
  m.def("head_d_hidden", [](const std::string& isa, uintptr_t stored, uintptr_t weight, uintptr_t out, int64_t n,
                            int64_t hidden_size, int64_t vocab_size, int64_t weight_stride, int64_t weight_column, int64_t stride,
                            bool accumulate, int dtype, bool weight_fp32, int threads) {
    const Product p{at<void>(stored), at<void>(weight), at<float>(out), n, hidden_size, vocab_size, weight_stride, stride, accumulate,
                    weight_column, weight_fp32};
    py::gil_scoped_release release;
    on_live_threads(threads, [&] { head_kernels(isa).d_hidden(p, static_cast<Dtype>(dtype), threads); });
  });
  m.def("head_d_weight", [](const std::string& isa, uintptr_t stored, uintptr_t scaled_hidden, uintptr_t out, uintptr_t rounded,
                            uintptr_t hidden, uintptr_t label, uintptr_t targets, int64_t n, int64_t hidden_size, int64_t vocab_size,
                            int64_t stride, bool accumulate, int dtype, int threads) {
    Product p{at<void>(stored), at<void>(scaled_hidden), at<float>(out), n, hidden_size, vocab_size, hidden_size, stride, accumulate};
    p.rounded = at<void>(rounded), p.hidden = at<void>(hidden), p.label = at<float>(label), p.targets = at<int64_t>(targets);
    py::gil_scoped_release release;
    on_live_threads(threads, [&] { head_kernels(isa).d_weight(p, static_cast<Dtype>(dtype), threads); });
  });
}
