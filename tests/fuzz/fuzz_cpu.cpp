// Random calls of every C++ entry point of the CPU kernels, for a build with -fsanitize=address,undefined.
//
//   fuzz_cpu FIRST_SEED COUNT [ISA]
//
// A seed is a case: shapes, strides, offsets, dtypes and values, on every instruction set of this processor. No buffer
// is a byte longer than the contract in csrc/*.h says. Outputs start as poison and have to be written; numbers are
// compared with plain loops in double. The first failure names its seed and ends the run.
#include <sanitizer/common_interface_defs.h>

#include "fuzz.h"

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "usage: fuzz_cpu FIRST_SEED COUNT [ISA]\n"), 2;
  const long first = std::atol(argv[1]), count = std::atol(argv[2]);
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "DIED in %s\n", now.c_str()); });
  std::string names;
  for (const std::string& isa : isas()) names += " " + isa;
  std::printf("instruction sets:%s\n", names.c_str());
  std::fflush(stdout);
  for (long seed = first; seed < first + count; ++seed) {
    rnd.bits.seed(seed);
    now = "seed " + std::to_string(seed);
    const std::string only_isa = argc > 3 ? argv[3] : "";
    if (rnd.chance(0.15)) check_gae_everywhere(only_isa);
    else if (rnd.chance(0.4)) check_selective(only_isa);
    else check_head(only_isa);
  }
  std::printf("%ld cases, none failed\n", count);
}
