// A thread of a block is a fiber: it runs until a barrier or a shuffle, then the next one does. A block whose threads
// wait for each other in vain throws.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <vector>

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emu {

constexpr std::size_t STACK_BYTES = 64 * 1024;

enum class State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, RETURNED };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  State state = State::READY;
};

inline std::vector<Fiber> fibers;
inline std::vector<std::uint64_t> posted;
inline unsigned current;
inline ucontext_t scheduler;
inline std::function<void()> kernel_call;

inline unsigned running() { return current; }

inline void wait_as(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void wait_for_block() { wait_as(State::AT_BLOCK_BARRIER); }
inline void wait_for_warp() { wait_as(State::AT_WARP_BARRIER); }

inline void run_fiber() {
  kernel_call();
  wait_as(State::RETURNED);
}

inline void resume(unsigned thread) {
  current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
  swapcontext(&scheduler, &fibers[thread].context);
}

// Frees fibers [from, to) if each of them waits at `barrier` or, where that is allowed, has returned.
inline bool release(unsigned from, unsigned to, State barrier, bool returned_too) {
  bool any = false;
  for (unsigned i = from; i < to; ++i) {
    if (fibers[i].state == barrier)
      any = true;
    else if (!(returned_too && fibers[i].state == State::RETURNED))
      return false;
  }
  for (unsigned i = from; any && i < to; ++i)
    if (fibers[i].state == barrier) fibers[i].state = State::READY;
  return any;
}

inline void run_block(unsigned n, dim3 block, std::function<void()> call) {
  blockIdx = block;
  kernel_call = call;
  if (fibers.size() < n) fibers.resize(n);
  posted.assign(n, ~0ull);
  for (unsigned i = 0; i < n; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::READY;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (;;) {
    bool moved = false;
    for (unsigned k = 0; k < n; ++k) {
      const unsigned i = reversed() ? n - 1 - k : k;
      if (fibers[i].state != State::READY) continue;
      resume(i);
      moved = true;
    }
    unsigned returned = 0;
    for (unsigned i = 0; i < n; ++i) returned += fibers[i].state == State::RETURNED;
    if (returned == n) return;
    for (unsigned i = 0; i < n; i += WARP) moved |= release(i, std::min(i + WARP, n), State::AT_WARP_BARRIER, true);
    // a block barrier that a returned thread never reaches is undefined behaviour on a GPU: it is not released
    moved |= release(0, n, State::AT_BLOCK_BARRIER, false);
    if (!moved) throw std::runtime_error("cuda_emu: the threads of a block wait for each other in vain");
  }
}

}  // namespace cuda_emu
