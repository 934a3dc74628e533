// What the .cu files share: a warp's sums, aligned loads, and the launch.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastpref {
namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32, MAX_WARPS = 32;

// N neighbours in memory that move as one access.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

inline bool aligned_to(const void* p, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }

// Up to 8 numbers of each warp, in shared memory; the function is no template: tests/cuda_emu poisons shared memory as a
// section of its own, and g++ puts what is static in a template into none.
struct WarpSums {
  double of[8][MAX_WARPS];
};
__device__ __forceinline__ WarpSums& warp_sums() {
  __shared__ WarpSums sums;
  return sums;
}

// Sums of N numbers over a block, in one fixed order; thread 0 alone has them. Every thread of the block calls once.
template <int THREADS, int N>
__device__ __forceinline__ void sum_over_block(double (&x)[N]) {
  constexpr int WARPS = THREADS / WARP;
  auto& of_warp = warp_sums().of;
  static_assert(N <= sizeof of_warp / sizeof *of_warp);
#pragma unroll
  for (int k = 0; k < N; ++k) {
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) x[k] += __shfl_xor_sync(ALL_LANES, x[k], distance);
    if (threadIdx.x % WARP == 0) of_warp[k][threadIdx.x / WARP] = x[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < N; ++k)
      for (int w = 1; w < WARPS; ++w) x[k] += of_warp[k][w];
  }
}

// Asynchronous; null, or the text of the error. `device` is set here too: the CUDA runtime linked into this module
// does not know what PyTorch's own has set.
template <class Args>
const char* launch(void (*kernel)(Args), std::int64_t blocks, int threads, int device, void* stream, const Args& args) {
  if (blocks > 0x7fffffff) return "a grid has at most 2^31 - 1 blocks";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace fastpref
