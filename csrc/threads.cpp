#include "threads.h"

#ifdef _OPENMP
#include <pthread.h>
#endif

namespace fastpref {

static bool is_child = false;

bool forked() { return is_child; }

#ifdef _OPENMP
[[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] { is_child = true; });
#endif

}  // namespace fastpref
