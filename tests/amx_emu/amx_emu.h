// The AMX tile instructions as plain C++, after their operation in Intel's SDM, volume 2, for a processor without them.
//
// Stricter than the hardware: a tile that is not configured, a row of a load or store that is not, a shape that does not
// fit or a thread that leaves its tiles configured ends the process with a line that says so.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emu {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "amx_emu: %s\n", what);
  std::abort();
}

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t data[16][64];
};

struct File {
  bool configured = false;
  Tile tiles[8];
  ~File() {
    if (configured) fail("a thread ends with its tiles configured");
  }
  Tile& operator[](int i) {
    if (!configured) fail("a tile is used before LDTILECFG");
    if (i < 0 || i > 7 || !tiles[i].rows) fail("a tile is used that is not configured");
    return tiles[i];
  }
};

inline thread_local File file;

inline void loadconfig(const void* memory) {
  uint8_t config[64];
  std::memcpy(config, memory, 64);
  if (config[0] != 1) fail("LDTILECFG: the palette must be 1");
  for (int i = 1; i < 16; ++i)
    if (config[i]) fail("LDTILECFG: start_row and reserved bytes must be 0");
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, rows = config[48 + i];
    if (i >= 8 ? rows || row_bytes : rows > 16 || row_bytes > 64 || !rows != !row_bytes) fail("LDTILECFG: a tile of no valid shape");
    if (i >= 8) continue;
    file.tiles[i].rows = rows;
    file.tiles[i].row_bytes = row_bytes;
    std::memset(file.tiles[i].data, 0, sizeof file.tiles[i].data);
  }
  file.configured = true;
}

inline void release() {
  if (!file.configured) fail("TILERELEASE of tiles that are not configured");
  file.configured = false;
  for (Tile& tile : file.tiles) tile.rows = tile.row_bytes = 0;
}

inline void zero(int to) { std::memset(file[to].data, 0, sizeof file[to].data); }

inline void load(int to, const void* base, int64_t stride) {
  Tile& tile = file[to];
  std::memset(tile.data, 0, sizeof tile.data);
  for (int i = 0; i < tile.rows; ++i) std::memcpy(tile.data[i], static_cast<const char*>(base) + i * stride, tile.row_bytes);
}

inline void store(int from, void* base, int64_t stride) {
  const Tile& tile = file[from];
  if (std::llabs(stride) < tile.row_bytes) fail("TILESTORED: rows overlap");
  for (int i = 0; i < tile.rows; ++i) std::memcpy(static_cast<char*>(base) + i * stride, tile.data[i], tile.row_bytes);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

inline float bf16(const uint8_t* p) {
  const uint32_t word = static_cast<uint32_t>(p[0] | p[1] << 8) << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return flushed(x);
}

// C[m, n] += sum over k of A[m, 2k] B[k, 2n], and of A[m, 2k + 1] B[k, 2n + 1]: each an fp32 FMA chain of its own, added
// to each other and then to C. Rounded to nearest even; denormals are zero, going in and coming out.
inline void dpbf16ps(int c_, int a_, int b_) {
  Tile &c = file[c_], &a = file[a_], &b = file[b_];
  if (c_ == a_ || c_ == b_ || a_ == b_) fail("TDPBF16PS: the tiles must be three");
  if (a.rows != c.rows || b.row_bytes != c.row_bytes || a.row_bytes != 4 * b.rows) fail("TDPBF16PS: the shapes do not fit");
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < b.rows; ++k) {
        even = flushed(std::fma(bf16(a.data[m] + 4 * k), bf16(b.data[k] + 4 * n), even));
        odd = flushed(std::fma(bf16(a.data[m] + 4 * k + 2), bf16(b.data[k] + 4 * n + 2), odd));
      }
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}

}  // namespace amx_emu

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emu::loadconfig
#define _tile_release amx_emu::release
#define _tile_loadd amx_emu::load
#define _tile_stored amx_emu::store
#define _tile_zero amx_emu::zero
#define _tile_dpbf16ps amx_emu::dpbf16ps
