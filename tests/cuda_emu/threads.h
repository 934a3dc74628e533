// A thread of a block is a thread of the system: for the thread sanitizer, which needs real ones to see a race. C++20.
#pragma once
#include <barrier>
#include <deque>
#include <thread>
#include <vector>

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_emu {

inline thread_local unsigned current;
inline std::vector<std::uint64_t> posted;
inline std::deque<std::barrier<>> block_barrier, warp_barriers;

inline unsigned running() { return current; }
inline void wait_for_block() { block_barrier[0].arrive_and_wait(); }
inline void wait_for_warp() { warp_barriers[current / WARP].arrive_and_wait(); }

inline void run_block(unsigned n, dim3 block, std::function<void()> call) {
  posted.assign(n, ~0ull);
  block_barrier.clear();
  block_barrier.emplace_back(n);
  warp_barriers.clear();
  for (unsigned i = 0; i < n; i += WARP) warp_barriers.emplace_back(n - i < WARP ? n - i : WARP);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < n; ++i)
    threads.emplace_back([=] {
      current = i;
      blockIdx = block;
      threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      call();
      block_barrier[0].arrive_and_drop();
      warp_barriers[i / WARP].arrive_and_drop();
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace cuda_emu
