// Stands in for CUDA's cuda_runtime.h, so that g++ compiles a .cu file as it is and its kernels run on the CPU.
//
// Blocks run one after another. A thread of a block is a fiber: it runs until a barrier or a shuffle, then the next
// one does, in ascending order, or in descending order where the environment has CUDA_EMU_REVERSE=1: a kernel that
// lacks a barrier gets other values in one of the two. A block whose threads wait for each other in vain throws.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emu {

constexpr unsigned WARP = 32, MAX_THREADS = 1024;
constexpr std::size_t STACK_BYTES = 64 * 1024;

enum class State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, RETURNED };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  State state = State::READY;
};

inline std::vector<Fiber> fibers;
inline std::vector<std::uint64_t> posted;  // what each thread offers in a shuffle
inline unsigned running;
inline ucontext_t scheduler;
inline std::function<void()> kernel_call;

inline void wait_as(State state) {
  fibers[running].state = state;
  swapcontext(&fibers[running].context, &scheduler);
}

inline void run_fiber() {
  kernel_call();
  wait_as(State::RETURNED);
}

inline void resume(unsigned thread) {
  running = thread;
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

inline void run_block(bool reverse) {
  const unsigned n = blockDim.x * blockDim.y * blockDim.z;
  if (n > MAX_THREADS) throw std::runtime_error("cuda_emu: a block has at most 1024 threads");
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
      const unsigned i = reverse ? n - 1 - k : k;
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

template <class T>
T shuffle(T value, unsigned from_lane) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  const unsigned source = running / WARP * WARP + from_lane;
  std::memcpy(&posted[running], &value, sizeof value);
  wait_as(State::AT_WARP_BARRIER);
  if (source < posted.size()) std::memcpy(&value, &posted[source], sizeof value);
  wait_as(State::AT_WARP_BARRIER);  // nobody posts again before everybody has read
  return value;
}

}  // namespace cuda_emu

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one copy serves: blocks run one after another

inline void __syncthreads() { cuda_emu::wait_as(cuda_emu::State::AT_BLOCK_BARRIER); }

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = cuda_emu::running % cuda_emu::WARP;
  return cuda_emu::shuffle(value, lane < distance ? lane : lane - distance);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  cuda_emu::kernel_call = [=] { kernel(arguments...); };
  const char* reverse = std::getenv("CUDA_EMU_REVERSE");
  for (unsigned z = 0; z < config->gridDim.z; ++z)
    for (unsigned y = 0; y < config->gridDim.y; ++y)
      for (unsigned x = 0; x < config->gridDim.x; ++x) {
        blockIdx = {x, y, z};
        cuda_emu::run_block(reverse && *reverse == '1');
      }
  return cudaSuccess;
}
