// Memory in which one byte too many is caught, whoever touches it.
//
// The address sanitizer watches plain loads and stores, but not the masked ones of AVX and AVX-512, nor AMX's: these
// are builtins to the compiler. So a buffer lies, by chance, between the sanitizer's red zones, or up against a page
// that nobody may touch, behind it or before it.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>

struct Buffer {
  char* data = nullptr;
  int64_t bytes = 0;

  Buffer() = default;
  // aligned to `alignment`, and by chance to no more
  Buffer(int64_t bytes, int64_t alignment, std::mt19937_64& random) : bytes(bytes) {
    const uint64_t draw = random();
    if (draw % 3 == 0) {
      const int64_t before = draw / 3 % 2 ? alignment * (draw / 6 % 16) : 0;
      block_ = static_cast<char*>(std::malloc(before + bytes));
      data = block_ + before;
      return;
    }
    const int64_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    void* map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map, page, PROT_NONE) || mprotect(static_cast<char*>(map) + page + inside, page, PROT_NONE)) {
      std::perror("mmap");
      std::exit(2);
    }
    block_ = static_cast<char*>(map);
    data = block_ + page + (draw % 3 == 1 ? inside - bytes : 0);
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data, other.data), std::swap(bytes, other.bytes);
    std::swap(block_, other.block_), std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~Buffer() {
    if (mapped_) munmap(block_, mapped_);
    else std::free(block_);
  }

  template <class T>
  T* as() const { return reinterpret_cast<T*>(data); }

  Buffer copy(int64_t first, int64_t size, int64_t alignment, std::mt19937_64& random) const {
    Buffer out(size, alignment, random);
    if (size) std::memcpy(out.data, data + first, size);
    return out;
  }

  // a signalling NaN in bf16, fp32 and fp64 alike, which no arithmetic returns
  void poison() {
    for (int64_t i = 0; i < bytes; ++i) data[i] = i % 2 ? '\x7f' : '\xa5';
  }
  bool has_poison(int64_t width) const {
    static const char pattern[] = {'\xa5', '\x7f', '\xa5', '\x7f', '\xa5', '\x7f', '\xa5', '\x7f'};
    for (int64_t i = 0; i < bytes; i += width)
      if (std::memcmp(data + i, pattern, width) == 0) return true;
    return false;
  }

 private:
  char* block_ = nullptr;
  int64_t mapped_ = 0;
};
