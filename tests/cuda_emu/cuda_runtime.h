// Stands in for CUDA's cuda_runtime.h, so that g++ compiles a .cu file as it is and its kernels run on the CPU.
//
// Blocks run one after another; shared memory is NaN when one starts. The threads of a block are fibers (fibers.h), or
// with CUDA_EMU_THREADS threads of the system (threads.h), which the thread sanitizer can watch. Where the environment
// has CUDA_EMU_REVERSE=1, blocks and fibers run in descending order: a kernel that lacks a barrier gets other values in
// one of the two orders.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>

using std::fma;
using std::isfinite;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_emu {

constexpr unsigned WARP = 32, MAX_THREADS = 1024;

inline bool reversed() {
  const char* reverse = std::getenv("CUDA_EMU_REVERSE");
  return reverse && *reverse == '1';
}

}  // namespace cuda_emu

// Each engine has threadIdx, blockIdx, blockDim and gridDim, and in cuda_emu: the number of the running thread, its two
// barriers, what the threads post in a shuffle, and run_block.
#ifdef CUDA_EMU_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
// one copy serves, as blocks run one after another; the section has all of them together
#define __shared__ static __attribute__((section("cuda_emu_shared")))

// of the linker: the section's ends, null in a file without shared memory
extern "C" __attribute__((weak, visibility("hidden"))) char __start_cuda_emu_shared[], __stop_cuda_emu_shared[];

namespace cuda_emu {

__attribute__((no_sanitize("address"))) inline void poison_shared_memory() {
  for (volatile char* p = __start_cuda_emu_shared; p < __stop_cuda_emu_shared; ++p) *p = '\xff';
}

template <class T>
T shuffle(T value, unsigned from_lane) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  const unsigned source = running() / WARP * WARP + from_lane;
  std::memcpy(&posted[running()], &value, sizeof value);
  wait_for_warp();
  if (source < posted.size()) std::memcpy(&value, &posted[source], sizeof value);
  wait_for_warp();  // nobody posts again before everybody has read
  return value;
}

inline unsigned lane() { return running() % WARP; }

}  // namespace cuda_emu

inline void __syncthreads() { cuda_emu::wait_for_block(); }
inline void __syncwarp(unsigned = ~0u) { cuda_emu::wait_for_warp(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_emu::shuffle(value, lane % cuda_emu::WARP);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = cuda_emu::lane();
  return cuda_emu::shuffle(value, lane < distance ? lane : lane - distance);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return cuda_emu::shuffle(value, cuda_emu::lane() ^ bits);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::uint64_t blocks = std::uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  if (threads == 0 || threads > cuda_emu::MAX_THREADS || blocks == 0) throw std::runtime_error("cuda_emu: no such launch");
  for (std::uint64_t k = 0; k < blocks; ++k) {
    const std::uint64_t i = cuda_emu::reversed() ? blocks - 1 - k : k;
    cuda_emu::poison_shared_memory();
    cuda_emu::run_block(threads, dim3(i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y),
                        [=] { kernel(arguments...); });
  }
  return cudaSuccess;
}
