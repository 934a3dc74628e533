// Kernels with OpenMP threads, in a forked process too.
//
// libgomp keeps a team for every thread that ran a parallel region. A fork copies the list of its members and not the
// members, and the child's next region would wait for them forever. A thread made after the fork has no such list.
#pragma once
#include <future>

namespace fastpref {

bool forked();  // whether this process is a fork of one that had loaded this library

template <class F>
void on_live_threads(int threads, F f) {
  if (threads > 1 && forked()) std::async(std::launch::async, f).get();
  else f();
}

}  // namespace fastpref
