// csrc/bind_head.cpp over one instruction set: csrc/head_isa.cpp, built with the emulated tiles.
#include <stdexcept>

#include "../../csrc/bind_head.cpp"

namespace fastpref {

namespace amx { extern const HeadKernels kernels; }

std::vector<std::string> isas() { return {"amx"}; }

const HeadKernels& head_kernels(const std::string& isa) {
  if (isa != "amx") throw std::invalid_argument("emulated: amx; got " + isa);
  return amx::kernels;
}

// the label's own products are none of the tiles'
void label_dots(const void*, const void*, const int64_t*, double*, int64_t, int64_t, int64_t, Dtype, int, int64_t, bool) {
  throw std::logic_error("label_dots is not emulated");
}

}  // namespace fastpref

PYBIND11_MODULE(_amx, m) { bind_head(m); }
