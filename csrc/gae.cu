// GAE on a GPU in one launch: a block a row, a scan from right to left.
//
// Bytes, at 512 x 4,096 with mask and dones: 2,097,152 steps x (4 + 4 + 1 + 1 read, 4 + 4 written) = 37.7 MB, the
// moments 12 KB. At the 4.3 TB/s that an H200 copies with that is 9 us; the bar is 20.
//
// One step of a row, or a run of them, is a map of G = V + lam A from its right end to its left:
//   A_t = r_t - V_t + gamma G_next,   G_t = V_t + lam (r_t - V_t) + gamma lam G_next
// A masked step is the identity; a terminal one has slope 0. Maps are composed within a thread, within a warp by
// shuffles (Hillis and Steele 1986), and over the block's warps; from one stretch of the row to the next goes one number,
// in double: the error does not grow with the row. What a block is depends on the length of a row alone, so that a row
// has the same bits whatever the others are.
#include "gae.h"
#include "launch.cuh"

namespace fastpref {
namespace {

constexpr int STEPS = 4;  // of a thread, neighbours in time: 16 bytes of fp32

struct Affine {
  float slope, offset;
};

// Each warp's map of a stretch, twice: while a slow warp still reads one, a fast one may write the other. No template, as
// in launch.cuh.
struct WarpTotals {
  Affine of[2][MAX_WARPS];
};
__device__ __forceinline__ WarpTotals& warp_totals() {
  __shared__ WarpTotals totals;
  return totals;
}

template <class T>
__device__ __forceinline__ T apply(Affine map, T g) {
  // a branch, not a product: a NaN after a terminal step must not cross it
  return map.slope == 0.0f ? T(map.offset) : fma(T(map.slope), g, T(map.offset));
}

__device__ __forceinline__ Affine then(Affine first, Affine second) {
  return {first.slope * second.slope, apply(second, first.offset)};
}

// Each lane's map after those of the lanes before it.
template <int LANES>
__device__ __forceinline__ Affine inclusive_scan(Affine map, int lane) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    const Affine right = {__shfl_up_sync(ALL_LANES, map.slope, distance), __shfl_up_sync(ALL_LANES, map.offset, distance)};
    if (lane >= distance) map = then(right, map);
  }
  return map;
}

__device__ __forceinline__ Affine of_lane(Affine map, int lane) {
  return {__shfl_sync(ALL_LANES, map.slope, lane), __shfl_sync(ALL_LANES, map.offset, lane)};
}

template <bool ALIGNED, class T>
__device__ __forceinline__ Vector<T, STEPS> load(const T* row, std::int64_t first, T outside) {
  Vector<T, STEPS> x;
  if (ALIGNED && first >= 0) return *reinterpret_cast<const Vector<T, STEPS>*>(row + first);
#pragma unroll
  for (int i = 0; i < STEPS; ++i) x.at[i] = !ALIGNED && first + i >= 0 ? row[first + i] : outside;
  return x;
}

template <bool ALIGNED, class T>
__device__ __forceinline__ void store(T* row, std::int64_t first, const Vector<T, STEPS>& x) {
  if constexpr (ALIGNED) {
    if (first >= 0) *reinterpret_cast<Vector<T, STEPS>*>(row + first) = x;
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
      if (first + i >= 0) row[first + i] = x.at[i];
  }
}

struct Inputs {
  Vector<float, STEPS> reward, value;
  Vector<std::uint8_t, STEPS> live, terminal;
};

template <bool ALIGNED>
__device__ __forceinline__ Inputs read(const GaeArgs& args, std::int64_t start, std::int64_t first) {
  Inputs in;
  in.reward = load<ALIGNED>(args.rewards + start, first, 0.0f);
  in.value = load<ALIGNED>(args.values + start, first, 0.0f);
#pragma unroll
  for (int i = 0; i < STEPS; ++i) in.live.at[i] = first + i >= 0, in.terminal.at[i] = 0;
  if (args.mask) in.live = load<ALIGNED>(args.mask + start, first, std::uint8_t(0));
  if (args.dones) in.terminal = load<ALIGNED>(args.dones + start, first, std::uint8_t(0));
  return in;
}

// Thread 0 holds the latest steps of each stretch. ALIGNED: STEPS steps are one access, in every row. 1,024 threads of a
// multiprocessor leave each 64 registers: enough, and 512 rows of 256 threads are then all under way at once.
template <int THREADS, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) gae_kernel(GaeArgs args) {
  constexpr int WARPS = THREADS / WARP, SPAN = THREADS * STEPS;
  auto& totals = warp_totals().of;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * args.n_steps;
  const float gamma = static_cast<float>(args.gamma), lam = static_cast<float>(args.lam);
  const float slope = static_cast<float>(args.gamma * args.lam);

  double moments[3] = {};  // of this thread: live steps, and the sums of A and A^2
  double carry = args.bootstrap ? args.bootstrap[blockIdx.x] : 0.0;  // G to the right of the stretch
  const int from_end = STEPS * (static_cast<int>(threadIdx.x) + 1);
  Inputs ahead = read<ALIGNED>(args, start, args.n_steps - from_end);
  int buffer = 0;
  for (std::int64_t end = args.n_steps; end > 0; end -= SPAN, buffer ^= 1) {
    const std::int64_t first = end - from_end;
    const Inputs in = ahead;
    ahead = read<ALIGNED>(args, start, first - SPAN);  // on its way while this stretch is scanned

    Affine map = {1.0f, 0.0f};
#pragma unroll
    for (int i = STEPS - 1; i >= 0; --i)
      if (in.live.at[i])
        map = then(map, {in.terminal.at[i] ? 0.0f : slope, fmaf(lam, in.reward.at[i] - in.value.at[i], in.value.at[i])});
    map = inclusive_scan<WARP>(map, lane);
    Affine before = of_lane(map, lane ? lane - 1 : 0);
    double g_right = carry;  // to the right of this warp
    if (WARPS == 1) {
      carry = apply(of_lane(map, WARP - 1), carry);
    } else {
      if (lane == WARP - 1) totals[buffer][warp] = map;
      __syncthreads();
      const Affine total = inclusive_scan<WARPS>(lane < WARPS ? totals[buffer][lane] : Affine{1.0f, 0.0f}, lane);
      const Affine of_warps_before = of_lane(total, warp ? warp - 1 : 0);
      if (warp) g_right = apply(of_warps_before, carry);
      carry = apply(of_lane(total, WARPS - 1), carry);
    }
    float g = static_cast<float>(lane ? apply(before, g_right) : g_right);

    Vector<float, STEPS> advantages, returns;
#pragma unroll
    for (int i = STEPS - 1; i >= 0; --i) {
      advantages.at[i] = returns.at[i] = 0.0f;
      if (!in.live.at[i]) continue;
      const float later = in.terminal.at[i] ? 0.0f : gamma * g;
      const float advantage = in.reward.at[i] - in.value.at[i] + later;
      g = fmaf(lam, advantage, in.value.at[i]);
      advantages.at[i] = advantage;
      returns.at[i] = in.reward.at[i] + later;
      moments[0] += 1;
      moments[1] += advantage;
      moments[2] += static_cast<double>(advantage) * advantage;
    }
    store<ALIGNED>(args.advantages + start, first, advantages);
    store<ALIGNED>(args.returns + start, first, returns);
  }
  if (!args.sums) return;
  sum_over_block<THREADS>(moments);
  if (threadIdx.x == 0)
    for (int k = 0; k < 3; ++k) args.sums[3 * static_cast<std::int64_t>(blockIdx.x) + k] = moments[k];
}

template <int THREADS>
const char* run(const GaeArgs& args, int device, void* stream) {
  bool aligned = args.n_steps % STEPS == 0;
  for (const void* floats : {static_cast<const void*>(args.rewards), static_cast<const void*>(args.values),
                             static_cast<const void*>(args.advantages), static_cast<const void*>(args.returns)})
    aligned &= aligned_to(floats, STEPS * sizeof(float));
  aligned &= aligned_to(args.mask, STEPS) && aligned_to(args.dones, STEPS);
  return launch(aligned ? gae_kernel<THREADS, true> : gae_kernel<THREADS, false>, args.n_rows, THREADS, device, stream, args);
}

}  // namespace

const char* gae_cuda(const GaeArgs& args, int device, void* stream) {
  if (args.n_rows == 0) return nullptr;
  if (args.n_steps <= 32 * STEPS) return run<32>(args, device, stream);
  if (args.n_steps <= 128 * STEPS) return run<128>(args, device, stream);
  if (args.n_steps <= 2048 * STEPS) return run<256>(args, device, stream);
  return run<1024>(args, device, stream);
}

}  // namespace fastpref
