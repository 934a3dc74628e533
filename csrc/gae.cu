#include <cuda_runtime.h>

#include "gae.h"

namespace fastpref {
namespace {

constexpr int THREADS = 256;  // steps of a row that a block takes at once
constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

// One step of the row, or a run of them, as a map of G = V + lam A from the right end to the left:
//   A_t = r_t - V_t + gamma G_next,   G_t = V_t + lam (r_t - V_t) + gamma lam G_next
// A masked step is the identity; a terminal one has slope 0.
struct Affine {
  float slope, offset;
};

__device__ __forceinline__ float apply(Affine map, float g) {
  // a branch, not a product: a NaN after a terminal step must not cross it
  return map.slope == 0.0f ? map.offset : fmaf(map.slope, g, map.offset);
}

__device__ __forceinline__ Affine then(Affine first, Affine second) {
  return {first.slope * second.slope, apply(second, first.offset)};
}

__device__ __forceinline__ Affine inclusive_scan_of_warp(Affine map, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Affine right = {__shfl_up_sync(ALL, map.slope, distance), __shfl_up_sync(ALL, map.offset, distance)};
    if (lane >= distance) map = then(right, map);
  }
  return map;
}

// Sum over the block, always in the same order.
__device__ __forceinline__ double sum_of_block(double x, double* of_warp, int lane, int warp) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x += __shfl_up_sync(ALL, x, distance);
  if (lane == 31) of_warp[warp] = x;  // only there is it the sum of all 32
  __syncthreads();
  double total = 0;
  for (int w = 0; w < WARPS; ++w) total += of_warp[w];
  __syncthreads();
  return total;
}

// One block a row. Thread 0 holds the latest step of each stretch of THREADS steps, taken right to left.
__global__ void __launch_bounds__(THREADS) gae_kernel(GaeArgs args) {
  __shared__ Affine warp_total[WARPS];
  __shared__ float carried;
  __shared__ double warp_sum[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * args.n_steps;
  const float gamma = static_cast<float>(args.gamma), lam = static_cast<float>(args.lam);

  double count = 0, sum = 0, sum_sq = 0;  // of this thread's advantages
  float carry = args.bootstrap ? args.bootstrap[blockIdx.x] : 0.0f;
  for (std::int64_t done_steps = 0; done_steps < args.n_steps; done_steps += THREADS) {
    const std::int64_t t = args.n_steps - 1 - done_steps - threadIdx.x;
    const bool inside = t >= 0;
    const bool live = inside && (!args.mask || args.mask[start + t]);
    const bool terminal = live && args.dones && args.dones[start + t];
    const float reward = live ? args.rewards[start + t] : 0.0f;
    const float value = live ? args.values[start + t] : 0.0f;

    Affine map = {1.0f, 0.0f};
    if (live) map = {terminal ? 0.0f : gamma * lam, fmaf(lam, reward - value, value)};
    map = inclusive_scan_of_warp(map, lane);
    if (lane == 31) warp_total[warp] = map;
    __syncthreads();
    float g_right = carry;  // G to the right of this warp
    for (int w = 0; w < warp; ++w) g_right = apply(warp_total[w], g_right);
    const float g = apply(map, g_right);
    const float neighbour = __shfl_up_sync(ALL, g, 1);
    const float g_next = lane == 0 ? g_right : neighbour;
    const float later = terminal ? 0.0f : gamma * g_next;

    if (inside) {
      const float advantage = live ? reward - value + later : 0.0f;
      count += live;
      sum += advantage;
      sum_sq += static_cast<double>(advantage) * advantage;
      args.advantages[start + t] = advantage;
      args.returns[start + t] = live ? reward + later : 0.0f;
    }
    if (threadIdx.x == THREADS - 1) carried = g;
    __syncthreads();
    carry = carried;
  }
  if (args.sums) {
    const double parts[] = {count, sum, sum_sq};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const double total = sum_of_block(parts[i], warp_sum, lane, warp);
      if (threadIdx.x == 0) args.sums[3 * blockIdx.x + i] = total;
    }
  }
}

}  // namespace

const char* gae_cuda(const GaeArgs& args, void* stream) {
  if (args.n_rows == 0 || args.n_steps == 0) return nullptr;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.n_rows));
  config.blockDim = dim3(THREADS);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, gae_kernel, args);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastpref
